"""Hand-written kernels without a fault, and each fault that the machine knows planted in them.

Each fault must name its line of the PTX and of the source; where the kernel waits for ever, the line of the wait.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import pytest
from effformer.bench.offline.ptx.faults import Fault
from effformer.bench.offline.ptx.machine import Options
from ptx_memory_runs import run
from ptx_runs import Array, Output, read

WORDS = np.arange(1, 65, dtype=np.uint32)
CALLS: dict[str, tuple[list[Array], list[Output], int, int]] = {  # inputs, outputs, shared memory, programs
    "global_memory": ([WORDS], [((128,), np.uint32)], 0, 2),
    "shared_memory": ([], [((64,), np.uint32)], 512, 1),
    "asynchronous_copies": ([np.arange(1, 129, dtype=np.uint32)], [((64,), np.uint32)], 512, 1),
    "warpgroup_products": ([], [((128, 8), np.float32)], 2304, 1),
    "tensor_memory": ([], [((128, 4), np.float32)], 8256, 1),
    "barrier": ([], [], 16, 1),
}
EXPECTED: dict[str, Array] = {
    "global_memory": np.tile(WORDS + np.roll(WORDS, 32), 2),
    "shared_memory": np.arange(64) ^ 33,
    "asynchronous_copies": np.arange(1, 128, 2) + np.roll(np.arange(2, 129, 2), 32),
    "warpgroup_products": np.tile([33.0] * 4 + [16.0] * 4, (128, 1)),
    "tensor_memory": np.full((128, 4), 33, np.float32),
}


def faults_of(name: str, ptx: str, options: Options | None = None) -> list[Fault]:
    inputs, outputs, shared_memory, programs = CALLS[name]
    return run(ptx, *inputs, outputs=outputs, shared_memory=shared_memory, programs=programs, options=options)[1]


@pytest.mark.parametrize("name", CALLS)
def test_the_kernels_have_no_fault(name: str) -> None:
    inputs, outputs, shared_memory, programs = CALLS[name]
    found, faults = run(read(name), *inputs, outputs=outputs, shared_memory=shared_memory, programs=programs)
    assert [str(fault) for fault in faults] == []
    if name in EXPECTED:
        assert (found[0] == EXPECTED[name]).all()


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call[3] == 1])
def test_several_programs_have_no_fault(name: str) -> None:
    """Without what they write: it would go to one place."""
    inputs, outputs, shared_memory, _ = CALLS[name]
    ptx = re.sub(r"\bst\.global.*", "", read(name))
    _, faults = run(ptx, *inputs, outputs=[WORDS.repeat(2)] if outputs else [], shared_memory=shared_memory, programs=3)
    assert [str(fault) for fault in faults] == []


class Plant(NamedTuple):
    """A change of a kernel, the fault that must be found, and what the line at fault contains."""

    kernel: str
    old: str
    new: str
    kind: str
    at: str


G, S, C, W, T, B = CALLS
NO_BARRIER = "bar.sync 0;                                 // "
WGMMA, WAIT = "wgmma.mma_async.sync.aligned", "wgmma.wait_group.sync.aligned"
PLANTS = [
    Plant(G, "[%rd3];  ", "[%rd3 + -4];", "global read out of bounds", "// the input"),
    Plant(G, "[%rd3];  ", "[%rd3 + 4];", "global read out of bounds", "// the input"),
    Plant(G, "[%rd3];  ", "[%rd3 + 0x80000];", "global read out of bounds", "// the input"),
    Plant(G, "[%rd4], %r5", "[%rd4 + 4], %r5", "global write out of bounds", "// its word"),
    Plant(G, "[%rd3];  ", "[%rd3 + 2];", "global read not aligned to 4 bytes", "// the input"),
    Plant(G, "[%rd4], %r5", "[%rd4 + 1], %r5", "global write not aligned to 4 bytes", "// its word"),
    Plant(G, "st.global.b32 [%rd4], %r5;", "", "global read of what was never written", "// the other word"),
    Plant(G, "[%rd4], %r5", "[%rd3], %r5", "global write to what is no output", "// its word"),
    Plant(G, "%r2, 64, %r1", "%r2, 0, %r1", "global race: one place written by two threads of one instruction", "// its word"),
    Plant(G, "%r1, 4, %rd1", "%r1, 0, %rd2", "global race: write of what another program read", "// its word"),
    Plant(G, "%r3, 32", "%r3, 96", "global race: read of what another program wrote", "// the other word"),
    Plant(G, "%r3, 32", "%r3, 96", "global race: write of what another program wrote", "// the sum"),
    Plant(G, "bar.sync 0;                                 // between", "",
          "global race: read of what another warp wrote, no barrier between", "// the other word"),
    Plant(G, "bar.sync 0;                                 // between", "ld.global.b32 %r6, [%rd5]; st.global.b32 [%rd5], 0; //",
          "global race: write of what another warp wrote, no barrier between", "st.global.b32 [%rd5], 0"),
    Plant(G, "st.global.b32 [%rd5], %r7", "red.global.gpu.relaxed.add.f32 [%rd5], %r7",
          "global race: atomic on what was stored in this launch", "// the sum"),
    Plant(S, "st.shared.b32 [%r3], %r1;", "", "shared read of what was never written", "// first load"),
    Plant(S, "[%r3], %r1;", "[%r3 + -4], %r1;", "shared access out of bounds", "// first"),
    Plant(S, "[%r7 + 256]; ", "[%r7 + 512];", "shared access out of bounds", "// the neighbour's"),
    Plant(S, "[%r3], %r1;", "[%r3 + 2], %r1;", "shared access not aligned to 4 bytes", "// first"),
    Plant(S, NO_BARRIER + "for the first load", "", "shared race: read of what another warp wrote, no barrier between", "// first load"),
    Plant(S, NO_BARRIER + "for the second store", "", "shared race: write of what another warp read, no barrier between", "// second"),
    Plant(S, NO_BARRIER + "for the third store", "", "shared race: write of what another warp wrote, no barrier between", "// third"),
    Plant(S, "bar.warp.sync -1;                           // for the load", "//",
          "shared race: read of what another thread of the warp wrote, no bar.warp.sync between", "// the neighbour's"),
    Plant(S, "bar.warp.sync -1;                           // for the next", "//",
          "shared race: write of what another thread of the warp read, no bar.warp.sync between", "// next"),
    Plant(S, "bar.warp.sync -1;                           // for the last", "//",
          "shared race: write of what another thread of the warp wrote, no bar.warp.sync between", "// last"),
    Plant(S, "bar.warp.sync -1;                           // for the store behind", "//",
          "shared race: write of what another thread of the warp read, no bar.warp.sync between", "// behind two loads"),
    Plant(S, "[%r3], %r10", "[%r2], %r10", "shared race: one place written with several values by one instruction", "// second"),
    Plant(C, "cp.async.wait_group 1", "cp.async.wait_group 2", "shared read of the target of cp.async before its wait", "// of the first"),
    Plant(C, "cp.async.wait_group 0", "cp.async.wait_group 1", "shared read of the target of cp.async before its wait", "// of the second"),
    Plant(C, "cp.async.wait_group 0;", "", "cp.async without a wait", "// second"),
    Plant(C, "cp.async.commit_group;                                          // second", "", "cp.async without a wait", "// second"),
    Plant(C, "[ %r3 + 256 ]", "[ %r3 + 0 ]", "shared race: two cp.async to one place", "// second"),
    Plant(C, "cp.async.wait_group 1;", "st.shared.b32 [%r3], 0;", "shared write to the target of cp.async before its wait", "st.shared"),
    Plant(C, "bar.sync 0;", "", "shared race: read of what another warp wrote, no barrier between", "// of the second"),
    Plant(C, "[ %rd3 + 4 ]", "[ %rd3 + 8 ]", "global read out of bounds", "// second"),
    Plant(W, "st.shared.b16 [%r4 + 2048], %h1;                                // B", "cp.async.ca.shared.global [%r4 + 2048], [%rd2], 4; //",
          "a matrix operand is the target of cp.async before its wait", "// first"),
    Plant(W, "fence.proxy.async.shared::cta;", "", "a product reads what was written without fence.proxy.async", "// first"),
    Plant(W, "bar.sync 0;                                                     // for the products", "",
          "shared race: a product reads what was written, no barrier between", "// first"),
    Plant(W, "st.shared.b16 [%r4 + 2048], %h1;                                // B", "//",
          "a matrix operand in shared memory was never written", "// first"),
    Plant(W, "0x0000000800400000", "0x0000000800400070", "a matrix operand outside shared memory", "// first"),
    Plant(W, f"{WAIT} 1", f"{WAIT} 2", "an accumulator is touched while its product runs", "// onto the first sums"),
    Plant(W, f"{WAIT} 0;", "", "an accumulator is touched while its product runs", "st.global.v4.b32 [%rd2], "),
    Plant(W, "wgmma.fence.sync.aligned;                                       // before", "",
          "wgmma without wgmma.fence after its accumulator was written", "// first"),
    Plant(W, "wgmma.fence.sync.aligned;                                       // before", "",
          "wgmma without wgmma.fence after a register of A was written", "// second"),
    Plant(W, "wgmma.fence.sync.aligned;                                       // again", "",
          "wgmma without wgmma.fence after its accumulator was written", "// third"),
    Plant(W, f"{WAIT} 1;", f"{WAIT} 1; mov.b32 %r31, 0;", "a register of A is written while its wgmma reads it", "// second"),
    Plant(W, f"{WAIT} 1;", f"{WAIT} 1; st.shared.b16 [%r4 + 2048], %h1;",
          "shared write to the operand of a product under way", "st.shared.b16 [%r4 + 2048], %h1;"),
    Plant(W, f"{WGMMA}.m64n8k16.f32.bf16.bf16 {{%r20", f"@!%p1 bra $L_behind; {WGMMA}.m64n8k16.f32.bf16.bf16 {{%r20", "wgmma by a part of a warpgroup",
          "// second"),
    Plant(W, "add.s64 %rd4, %rd3, 0x", "cvt.u64.u32 %rd5, %r1; add.s64 %rd3, %rd3, %rd5; add.s64 %rd4, %rd3, 0x",
          "the descriptors of a warpgroup differ", "// first"),
    Plant(W, "// what follows\n", f"// what follows\n    {WGMMA}.m64n8k16.f32.bf16.bf16 {{%r10,%r11,%r12,%r13}}, %rd3, %rd4, 0, 1, 1, 0, 0; // late\n",
          "wgmma without a wait", "// late"),
    Plant(W, "bar.sync 0;                                                     // for what follows", "",
          "shared race: write of what another warp read, no barrier between", "// what follows"),
    Plant(T, "fence.proxy.async.shared::cta;", "", "a product reads what was written without fence.proxy.async", "// first"),
    Plant(T, "bar.sync 0;                                                     // for the product", "",
          "shared race: a product reads what was written, no barrier between", "// first"),
    Plant(T, "bar.sync 0;                                                     // for the product", "",
          "tensor memory: a product reads what was stored, no barrier between", "// first"),
    Plant(T, "bar.sync 0;                                                     // for the next", "//",
          "tensor memory: a product reads what was stored, no barrier between", "// second"),
    Plant(T, "bar.sync 0;                                                     // for the next", "//",
          "tensor memory: a product writes what was read, no barrier between", "// second"),
    Plant(T, "st.shared.b32 [%r4 + 4096], %r9;", "", "a matrix operand in shared memory was never written", "// first"),
    Plant(T, "tcgen05.wait::st.sync.aligned;                                  // of the zeros", "",
          "tensor memory: a product reads what was stored without tcgen05.wait::st", "// first"),
    Plant(T, "tcgen05.wait::st.sync.aligned;                                  // of the sums",
          "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r39}, [%r7 + 0];",
          "tensor memory: read of what was stored without tcgen05.wait::st", "{%r39}"),
    Plant(T, "tcgen05.wait::ld.sync.aligned;                                  // first", "",
          "the target of tcgen05.ld is touched before tcgen05.wait::ld", "// onto the sums"),
    Plant(T, "tcgen05.wait::ld.sync.aligned;                                  // second", "",
          "the target of tcgen05.ld is touched before tcgen05.wait::ld", "st.global"),
    Plant(T, "mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r5], 0;\n    @!%p3 bra $L_first;", "\n",
          "tensor memory: read while a product runs on it", "// first"),
    Plant(T, "@!%p3 bra $L_first;", "", "tensor memory: read while a product runs on it", "// first"),
    Plant(T, "@!%p3 bra $L_second;", "", "tcgen05.mma without a wait", "// second"),
    Plant(T, "@%p2 mbarrier.init.shared::cta.b64 [%r5], 1;", "", "tcgen05.commit to an mbarrier that was not initialised", "// first"),
    Plant(T, "@%p2 mbarrier.init.shared::cta.b64 [%r5], 1;", "", "a wait for an mbarrier that was not initialised", "[%r5], 0;"),
    Plant(T, "@%p2 mbarrier.init.shared::cta.b64 [%r5], 1;", "", "an mbarrier is invalidated that was not initialised", "inval"),
    Plant(T, "bar.sync 0;                                                     // for the address", "",
          "shared race: read of what another warp wrote, no barrier between", "ld.shared.b32 %r6"),
    Plant(T, "bar.sync 0;                                                     // for the end", "",
          "shared race: write of what another warp read, no barrier between", "inval"),
    Plant(T, "[%r7 + 0];         // first", "[%r7 + 30]; // first", "tensor memory access out of bounds", "// first"),
    Plant(T, "and.b32 %r7, %r1, 0x60;", "mov.b32 %r7, 0;", "tensor memory access out of bounds", "// zeros"),
    Plant(T, "[%r7 + 0];         // first", "[%r7 + 16]; // first", "tensor memory: read of what was never written", "// first"),
    Plant(T, "[ %r6 + 0 ], %rd3, %rd4, %r11, %p4;        // first", "[ %r6 + 20 ], %rd3, %rd4, %r11, %p4; // first",
          "tensor memory: a product out of bounds", "// first"),
    Plant(T, "[ %r6 + 0 ], %rd3, %rd4, %r11, %p4;        // first", "[ %r6 + 0 ], [ %r6 + 16 ], %rd4, %r11, %p4; // first",
          "tensor memory: a product reads what was never written", "// first"),
    Plant(T, "@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r6, 32;", "", "tensor memory is not given back", "ret;"),
    Plant(T, "@%p1 tcgen05.dealloc", "@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r6, 32;\n    @%p1 tcgen05.dealloc",
          "tensor memory is given back that is not allocated", "@%p1 tcgen05.dealloc"),
    Plant(T, "@%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r5];  // first",
          "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r5]; // first", "tcgen05 by several threads of a program", "// first"),
    Plant(T, "    .loc 1 32 5", "    .loc 1 132 5\n    st.shared.b32 [%r4 + 4096], %r9; // late",
          "shared write to the operand of a product under way", "// late"),
    Plant(T, "    .loc 1 32 5", "    .loc 1 132 5\n    tcgen05.st.sync.aligned.32x32b.x1.b32 [%r7 + 0], {%r8}; // late",
          "tensor memory: write while a product runs on it", "// late"),
    Plant(T, "    tcgen05.wait::st.sync.aligned;                                  // of the zeros", "    setp.ne.u32 %p4, 0, 0;",
          "tensor memory: a product writes what was stored without tcgen05.wait::st", "// first"),
    Plant(T, "    @%p1 tcgen05.relinq", "    @%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r2 + 8208], 32; // twice\n    @%p1 tcgen05.relinq",
          "tensor memory is allocated twice", "// twice"),
    Plant(T, "    .loc 1 42 5\n", "    @%p2 mbarrier.inval.shared::cta.b64 [%r5];\n    bar.sync 0;\n    @%p2 mbarrier.init.shared::cta.b64 [%r5 + 32], 1;\n"
          "    @%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r5 + 32];\n    bar.sync 0;\n"
          "$L_other:\n    mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r5 + 32], 0;\n    @!%p3 bra $L_other;\n    .loc 1 142 5\n",
          "tcgen05.commit arrives at an mbarrier that was given up", "// second"),
    Plant(T, "    fence.proxy.async.shared::cta;", "    @!%p1 bra $L_on;\n    fence.proxy.async.shared::cta;\n$L_on:",
          "a product reads what was written without fence.proxy.async", "// first"),
    Plant(T, "    @%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r5];  // first",
          "    setp.eq.u32 %p5, %r1, 32;\n    @%p5 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r5]; // first",
          "tcgen05.commit by another thread than its product", "// first"),
    Plant(T, "[ %r6 + 0 ], %rd3, %rd4, %r11, %p4;        // first", "[ %r6 + 0 ], [ %r6 + 0x200010 ], %rd4, %r11, %p4; // first",
          "tensor memory: a product out of bounds", "// first"),
    Plant(B, "@%p1 mbarrier.init.shared::cta.b64 [%r2], 64;", "", "an arrival at an mbarrier that was not initialised", "arrive"),
    Plant(B, "bar.sync 0;", "", "shared race: read of what another warp wrote, no barrier between", "try_wait"),
    # into PLANTS of tests/test_ptx_faults.py
    Plant(C, "cp.async.wait_group 0;", "setp.ne.u32 %p1, 0, 0; @%p1 cp.async.wait_group 0;",
          "shared read of the target of cp.async before its wait", "// of the second"),
    Plant(W, f"{WAIT} 1;", f"@!%p2 {WAIT} 1;", "an accumulator is touched while its product runs", "// onto the first sums"),
    Plant(T, "fence.proxy.async.shared::cta;", "@!%p4 fence.proxy.async.shared::cta;",
          "a product reads what was written without fence.proxy.async", "// first"),
    Plant(T, "tcgen05.wait::st.sync.aligned;                                  // of the zeros", "@!%p4 tcgen05.wait::st.sync.aligned;",
          "tensor memory: a product reads what was stored without tcgen05.wait::st", "// first"),
    Plant(T, "setp.lt.u32 %p1, %r1, 32;", "setp.lt.u32 %p1, %r1, 1;", "tcgen05 by a part of a warp", "@%p1 tcgen05.alloc"),
]  # fmt: skip


def planted(plant: Plant) -> str:
    original = read(plant.kernel)
    assert original.count(plant.old) == 1, plant.old
    return original.replace(plant.old, plant.new)


def source_at(lines: list[str], line: int) -> str:
    """By the last `.loc` before a line of the PTX."""
    places = [found[1] for one in lines[:line] if (found := re.match(r"\s*\.loc 1 (\d+)", one))]
    return f"hand_written.py:{places[-1]}"


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: f"{plant.kernel}: {plant.kind} {plant.at}")
def test_faults_are_found(plant: Plant) -> None:
    ptx = planted(plant)
    lines = ptx.splitlines()
    faults = faults_of(plant.kernel, ptx)
    found = [fault for fault in faults if fault.kind == plant.kind]
    named = [lines[fault.line - 1] for fault in found]
    assert any(line.endswith(plant.at) if plant.at[0] == "/" else plant.at in line for line in named), [
        *map(str, faults)
    ]
    for fault in found:
        assert fault.source == source_at(lines, fault.line)
        assert fault.text in lines[fault.line - 1]


@pytest.mark.parametrize("plant", [plant for plant in PLANTS if "race" in plant.kind or "never written" in plant.kind],
                         ids=lambda plant: f"{plant.kernel}: {plant.kind} {plant.at}")  # fmt: skip
def test_races_are_not_watched_without_the_option(plant: Plant) -> None:
    faults = faults_of(plant.kernel, planted(plant), Options(watch=False))
    assert plant.kind not in [fault.kind for fault in faults]


@pytest.mark.parametrize(("tensor", "kind", "line"), [(0, "global read outside the tensor's elements", "// the input"),
                                                      (1, "global write outside the tensor's elements", "// its word")])  # fmt: skip
def test_elements_that_do_not_belong_to_a_tensor(tensor: int, kind: str, line: str) -> None:
    inputs, outputs, _, programs = CALLS[G]
    outside = np.arange(128 if tensor else 64) == 40
    lines = read(G).splitlines()
    found, faults = run(read(G), *inputs, outputs=outputs, programs=programs, outside={tensor: outside})
    first = next(fault for fault in faults if fault.kind == kind)
    assert lines[first.line - 1].endswith(line)
    assert first.count == (1 if tensor else programs)
    assert first.source == source_at(lines, first.line)
    if tensor:
        assert found[0][40] == 0  # it is not written


@pytest.mark.parametrize(("name", "old", "new"), [
    (B, "[%r2], 64;", "[%r2], 65;"),
    (T, "@%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r5];  // second", ""),
])  # fmt: skip
def test_waits_without_an_end(name: str, old: str, new: str) -> None:
    ptx = planted(Plant(name, old, new, "", ""))
    with pytest.raises(TimeoutError, match=r"PTX line \d+ waits for ever: mbarrier\.try_wait") as caught:
        faults_of(name, ptx)
    line = int(re.findall(r"line (\d+)", str(caught.value))[0])
    assert "try_wait" in ptx.splitlines()[line - 1]


def test_the_reader_may_fence_behind_the_barrier() -> None:
    fence, barrier = (
        "fence.proxy.async.shared::cta;",
        "bar.sync 0;                                                     // for the product",
    )
    ptx = read(T).replace(fence, "").replace(barrier, f"bar.sync 0;\n    @!%p1 bra $L_on;\n    {fence}\n$L_on:")
    assert not faults_of(T, ptx)
