"""Loads, stores, atomics, matrices of 8x8 and asynchronous copies of hand-written PTX, with results that are known."""

from __future__ import annotations

import numpy as np
import pytest
from effformer.bench.offline.ptx.registry import UnknownInstructionError
from ptx_memory_runs import kernel, names, result, run
from ptx_runs import Array

GLOBAL = [(kind, count) for kind in ("b8", "b16", "b32", "b64") for count in (1, 2, 4)]
GLOBAL = [*GLOBAL, ("f32", 4), ("f64", 2), ("u16", 2), ("b32", 8)]
REGISTER = {1: "h", 2: "h", 4: "r", 8: "rd"}


def size_of(kind: str) -> int:
    return int(kind[1:]) // 8


def vector(count: int) -> str:
    return "" if count == 1 else f".v{count}"


def numbers(size: int, count: int) -> Array:
    """All different as far as the type allows."""
    return (np.arange(count * size, dtype=np.uint8) * 37 + 5).view(f"u{size}")


@pytest.mark.parametrize(("kind", "count"), GLOBAL)
def test_global_loads_and_stores(kind: str, count: int) -> None:
    """Each thread moves a vector to the place of the thread opposite."""
    size, registers = size_of(kind), names(REGISTER[size_of(kind)], count, 1)
    ptx = kernel(f"""
    xor.b32 %r0, %t, 31;
    mad.wide.u32 %rd40, %t, {size * count}, %g0;
    mad.wide.u32 %rd41, %r0, {size * count}, %g1;
    ld.global{vector(count)}.{kind} {registers}, [%rd40];
    st.global{vector(count)}.{kind} [%rd41 + 0], {registers};
    """, pointers=2, target="sm_100a")  # fmt: skip
    given = numbers(size, 32 * count)
    found = result(ptx, given, output=(given.shape, given.dtype))
    assert (found.reshape(32, count) == given.reshape(32, count)[::-1]).all()


@pytest.mark.parametrize(("kind", "extended"), [("s8", -1), ("u8", 255), ("b8", 255), ("s16", -1), ("u16", 65535)])
def test_small_loads_are_extended(kind: str, extended: int) -> None:
    ptx = kernel(f"""
    ld.global.{kind} %r1, [%g0];
    mad.wide.u32 %rd1, %t, 4, %g1;
    st.global.b32 [%rd1], %r1;
    """, pointers=2)  # fmt: skip
    given = np.full(2, 0xFF, np.uint8).view(f"u{size_of(kind)}")
    assert (result(ptx, given, output=((32,), np.int32)) == extended).all()


def test_small_stores_are_cut_off() -> None:
    ptx = kernel("""
    add.u32 %r1, %t, 0xabcd00;
    cvt.u64.u32 %rd1, %t;
    add.s64 %rd1, %rd1, %g0;
    st.global.b8 [%rd1], %r1;
    """, pointers=1)  # fmt: skip
    assert (result(ptx, output=((32,), np.uint8)) == np.arange(32)).all()


LOADS = ["ld.volatile.global", "ld.global.ca", "ld.global.cg", "ld.global.cv", "ld.global.nc", "ld.global.L1::evict_first",
         "ld.global.L1::evict_last", "ld.global.L1::no_allocate.L2::128B", "ld.relaxed.gpu.global"]  # fmt: skip
STORES = ["st.global.wb", "st.global.cg", "st.global.cs", "st.global.wt", "st.global.L1::evict_last", "st.volatile.global",
          "st.relaxed.gpu.global"]  # fmt: skip


@pytest.mark.parametrize(
    ("load", "store"), [*zip(LOADS, "st.global " * 9, strict=False), *[("ld.global", s) for s in STORES]]
)
def test_cache_modifiers_change_no_value(load: str, store: str) -> None:
    store = store if store.startswith("st.") else "st.global"
    ptx = kernel(f"""
    mad.wide.u32 %rd1, %t, 8, %g0;
    mad.wide.u32 %rd2, %t, 8, %g1;
    {load}.v2.b32 {{%r1, %r2}}, [ %rd1 + 0 ];
    {store}.v2.b32 [ %rd2 + 0 ], {{%r2, %r1}};
    """, pointers=2)  # fmt: skip
    given = numbers(4, 64)
    assert (result(ptx, given, output=((64,), np.uint32)).reshape(32, 2) == given.reshape(32, 2)[:, ::-1]).all()


def test_cache_policies() -> None:
    ptx = kernel("""
    mad.wide.u32 %rd1, %t, 4, %g0;
    mad.wide.u32 %rd2, %t, 4, %g1;
    createpolicy.fractional.L2::evict_first.b64 %rd3, 1.0;
    ld.global.L1::evict_first.L2::cache_hint.b32 {%r1}, [ %rd1 + 0 ], %rd3;
    st.global.L1::evict_first.L2::cache_hint.b32 [ %rd2 + 0 ], {%r1}, %rd3;
    """, pointers=2)  # fmt: skip
    given = numbers(4, 32)
    assert (result(ptx, given, output=((32,), np.uint32)) == given).all()


def test_predicates_keep_registers_and_memory() -> None:
    """As Triton writes masked loads: a value for lanes that are off, then the load."""
    ptx = kernel("""
    setp.lt.u32 %p1, %t, 20;
    setp.ge.u32 %p2, %t, 4;
    mad.wide.u32 %rd1, %t, 4, %g0;
    mad.wide.u32 %rd2, %t, 4, %g1;
    mov.u32 %r1, 77;
    @%p1 ld.global.b32 { %r1 }, [ %rd1 + 0 ];
    @!%p2 st.global.b32 [ %rd2 + 0 ], { %r1 };
    @%p2 st.global.b32 [ %rd2 + 0 ], 5;
    @!%p1 st.global.b32 [ %rd2 + 0 ], { %r1 };
    """, pointers=2)  # fmt: skip
    given = numbers(4, 20)  # nothing behind it: lanes that are off touch no memory
    found = result(ptx, given, output=((32,), np.uint32))
    assert (found == [*given[:4], *[5] * 16, *[77] * 12]).all()


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(
    "form", ["atom.global.gpu.relaxed.add", "atom.relaxed.gpu.global.add", "red.relaxed.gpu.global.add"]
)
def test_atomic_sums(form: str, count: int) -> None:
    """Three programs of two warps add t + program to place t % 8."""
    targets, given = (names("r", count, first) if count > 1 else f"%r{first}" for first in (10, 20))
    targets = f"{targets}, " if form.startswith("atom") else ""
    values = "\n".join(f"add.f32 %r{20 + n}, %r2, 0f{np.float32(n).view(np.uint32):08x};" for n in range(count))
    ptx = kernel(f"""
    mov.u32 %r0, %ctaid.x;
    add.u32 %r1, %t, %r0;
    cvt.rn.f32.u32 %r2, %r1;
    {values}
    and.b32 %r3, %t, 7;
    mad.wide.u32 %rd1, %r3, {4 * count}, %g0;
    {form}{vector(count)}.f32 {targets}[ %rd1 + 0 ], {given};
    """, pointers=1, threads=64)  # fmt: skip
    before = np.arange(8 * count, dtype=np.float32) * 100
    found = result(ptx, output=before, programs=3)
    sums = np.zeros((8, count))
    for program in range(3):
        for thread in range(64):
            sums[thread % 8] += thread + program + np.arange(count)
    assert (found.reshape(8, count) == before.reshape(8, count) + sums).all()


def test_atomics_return_what_was_there() -> None:
    ptx = kernel("""
    mad.wide.u32 %rd1, %t, 8, %g0;
    mad.wide.u32 %rd2, %t, 8, %g1;
    atom.global.gpu.relaxed.add.v2.f32 {%r1, %r2}, [ %rd1 + 0 ], {0f3f800000, 0f40000000};
    st.global.v2.b32 [%rd2], {%r1, %r2};
    """, pointers=2)  # fmt: skip
    given = np.arange(64, dtype=np.float32).reshape(32, 2)
    (sums, before), faults = run(ptx, outputs=[given, ((32, 2), np.float32)])
    assert not faults
    assert (sums == given + np.array([1, 2], np.float32)).all()
    assert (before == given).all()


# --- shared memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "count"), [one for one in GLOBAL if size_of(one[0]) * one[1] <= 16])
def test_shared_loads_and_stores(kind: str, count: int) -> None:
    """64 threads, the upper warp at first: values pass to the other warp, the vector backwards."""
    size = size_of(kind)
    prefix = REGISTER[size]
    backwards = "{" + ", ".join(f"%{prefix}{1 + n}" for n in reversed(range(count))) + "}"
    ptx = kernel(f"""
    xor.b32 %r0, %t, 63;
    mad.wide.u32 %rd40, %t, {size * count}, %g0;
    mad.wide.u32 %rd41, %t, {size * count}, %g1;
    mad.lo.u32 %r40, %t, {size * count}, %smem;
    mad.lo.u32 %r41, %r0, {size * count}, %smem;
    ld.global{vector(count)}.{kind} {names(prefix, count, 1)}, [%rd40];
    st.shared{vector(count)}.{kind} [%r40 + 64], {backwards};
    bar.sync 0;
    ld.shared::cta{vector(count)}.{kind} {names(prefix, count, 1)}, [%r41 + 64];
    st.global{vector(count)}.{kind} [%rd41], {names(prefix, count, 1)};
    """, pointers=2, threads=64)  # fmt: skip
    given = numbers(size, 64 * count)
    found = result(ptx, given, output=(given.shape, given.dtype))
    assert (found == given[::-1]).all()


def test_each_program_has_shared_memory_of_its_own() -> None:
    ptx = kernel("""
    mov.u32 %r0, %ctaid.x;
    mad.lo.u32 %r1, %t, 4, %smem;
    st.shared.b32 [%r1], %r0;
    bar.sync 0;
    xor.b32 %r2, %t, 63;
    mad.lo.u32 %r1, %r2, 4, %smem;
    ld.shared.b32 %r3, [%r1];
    mad.lo.u32 %r4, %r0, 64, %t;
    mad.wide.u32 %rd1, %r4, 4, %g0;
    st.global.b32 [%rd1], %r3;
    """, pointers=1, threads=64)  # fmt: skip
    assert (result(ptx, output=((3, 64), np.uint32), shared_memory=256, programs=3) == [[0], [1], [2]]).all()


# --- matrices of 8x8 ------------------------------------------------------------------------------------------------------


def fragments(matrices: Array, *, trans: bool) -> Array:
    """[32, matrices, 2]: thread t holds two neighbours of row t / 4, or of column t / 4."""
    thread, half = np.arange(32)[:, None], np.arange(2)[None, :]
    if trans:
        return matrices[:, thread % 4 * 2 + half, thread // 4].transpose(1, 0, 2)
    return matrices[:, thread // 4, thread % 4 * 2 + half].transpose(1, 0, 2)


ORDER = np.random.default_rng(0).permutation(32)  # where row r of matrix j lies: in chunk ORDER[8 * j + r]


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count: int, trans: bool) -> None:
    ptx = kernel(f"""
    mad.wide.u32 %rd1, %t, 16, %g0;
    ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd1];
    mad.lo.u32 %r5, %t, 16, %smem;
    st.shared.v4.b32 [%r5], {{%r1, %r2, %r3, %r4}};
    mad.wide.u32 %rd2, %t, 4, %g1;
    ld.global.b32 %r6, [%rd2];
    mad.lo.u32 %r6, %r6, 16, %smem;
    bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x{count}{".trans" if trans else ""}.shared.b16 {names("r", count, 10)}, [%r6];
    mad.wide.u32 %rd3, %t, {4 * count}, %g2;
    st.global{vector(count)}.b32 [%rd3], {names("r", count, 10)};
    """, pointers=3)  # fmt: skip
    chunks = np.arange(256, dtype=np.uint16).reshape(32, 8)
    order = ORDER.astype(np.uint32)
    order[8 * count :] = 0xFFFFFF  # these lanes' addresses must not matter
    found = result(ptx, chunks, order, output=((32, count, 2), np.uint16))
    assert (found == fragments(chunks[ORDER].reshape(4, 8, 8)[:count], trans=trans)).all()


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count: int, trans: bool) -> None:
    ptx = kernel(f"""
    mad.lo.u32 %r0, %t, 16, %smem;
    st.shared.v4.b32 [%r0], {{-1, -1, -1, -1}};
    bar.warp.sync -1;
    mad.wide.u32 %rd1, %t, {4 * count}, %g0;
    ld.global{vector(count)}.b32 {names("r", count, 10)}, [%rd1];
    mad.wide.u32 %rd2, %t, 4, %g1;
    ld.global.b32 %r6, [%rd2];
    mad.lo.u32 %r6, %r6, 16, %smem;
    stmatrix.sync.aligned.m8n8.x{count}{".trans" if trans else ""}.shared.b16 [%r6], {names("r", count, 10)};
    bar.warp.sync -1;
    ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [%r0];
    mad.wide.u32 %rd3, %t, 16, %g2;
    st.global.v4.b32 [%rd3], {{%r1, %r2, %r3, %r4}};
    """, pointers=3)  # fmt: skip
    matrices = np.arange(64 * count, dtype=np.uint16).reshape(count, 8, 8)
    expected = np.full((32, 8), 0xFFFF, np.uint16)
    expected[ORDER[: 8 * count]] = matrices.reshape(-1, 8)
    given = np.ascontiguousarray(fragments(matrices, trans=trans))
    assert (result(ptx, given, ORDER.astype(np.uint32), output=((32, 8), np.uint16)) == expected).all()


@pytest.mark.parametrize("off", ["ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r2]",
                                 "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r2], {%r1}"])  # fmt: skip
def test_matrices_of_warps_that_are_off(off: str) -> None:
    """The predicate is off for the upper warp, whose address would be far outside."""
    ptx = kernel(f"""
    setp.eq.u32 %p1, %warp, 0;
    and.b32 %r3, %t, 7;
    mad.lo.u32 %r2, %r3, 16, %smem;
    st.shared.v4.b32 [%r2], {{7, 7, 7, 7}};
    mad.lo.u32 %r2, %warp, 0x100000, %r2;
    mov.b32 %r1, 9;
    bar.sync 0;
    @%p1 {off};
    bar.sync 0;
    @%p1 ld.shared.b32 %r4, [%r2];
    @%p1 add.u32 %r1, %r1, %r4;
    mad.wide.u32 %rd1, %t, 4, %g0;
    st.global.b32 [%rd1], %r1;
    """, pointers=1, threads=64)  # fmt: skip
    outputs, faults = run(ptx, outputs=[((2, 32), np.uint32)])
    assert {fault.kind for fault in faults} <= {"shared race: write of what another warp wrote, no barrier between"}
    assert (outputs[0] == [[14 if off.startswith("ld") else 18], [9]]).all()


# --- asynchronous copies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cache", "size"), [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)])
def test_asynchronous_copies(cache: str, size: int) -> None:
    """Even threads copy; of odd ones the source's size is 0: zeros, and no memory is touched."""
    words = size // 4
    ptx = kernel(f"""
    and.b32 %r1, %t, 1;
    setp.eq.u32 %p1, %r1, 0;
    selp.b32 %r2, {size}, 0, %p1;
    mad.wide.u32 %rd1, %t, {size}, %g0;
    @!%p1 mov.b64 %rd1, 0;
    mad.lo.u32 %r3, %t, {size}, %smem;
    cp.async.{cache}.shared.global [ %r3 + 0 ], [ %rd1 + 0 ], 0x{size:x}, %r2;
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared{vector(words)}.b32 {names("r", words, 10)}, [%r3];
    mad.wide.u32 %rd2, %t, {size}, %g1;
    st.global{vector(words)}.b32 [%rd2], {names("r", words, 10)};
    """, pointers=2)  # fmt: skip
    given = numbers(4, 32 * words).reshape(32, words)
    assert (result(ptx, given, output=((32, words), np.uint32)) == np.where(np.arange(32)[:, None] % 2, 0, given)).all()


def copy_in(place: int) -> str:
    return f"cp.async.ca.shared.global [%r3 + {128 * place}], [%rd1 + {128 * place}], 4;\n"


GROUPS = {
    "one behind": ("".join(copy_in(n) + "cp.async.commit_group;\n" for n in range(3)) + "cp.async.wait_group 1;", 2),
    "two in a group": (copy_in(0) + copy_in(1) + "cp.async.commit_group;" + copy_in(2) + "cp.async.commit_group;\n"
                       "cp.async.wait_group 1;", 2),
    "an empty group": (copy_in(0) + "cp.async.commit_group;\ncp.async.commit_group;\ncp.async.wait_group 1;", 1),
    "all": ("".join(copy_in(n) for n in range(3)) + "cp.async.wait_all;", 3),
    "all groups": ("".join(copy_in(n) + "cp.async.commit_group;\n" for n in range(3)) + "cp.async.wait_group 0;", 3),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "further"), [(name, more) for name in GROUPS for more in (False, True) if GROUPS[name][1] + more <= 3]
)
def test_groups_of_copies(name: str, further: bool) -> None:
    """What a wait is for has arrived without a fault; what is further has not."""
    copies, count = GROUPS[name]
    read = count if further else count - 1
    ptx = kernel(f"""
    mad.wide.u32 %rd1, %t, 4, %g0;
    mad.wide.u32 %rd2, %t, 4, %g1;
    mad.lo.u32 %r3, %t, 4, %smem;
    {copies}
    ld.shared.b32 %r1, [%r3 + {128 * read}];
    st.global.b32 [%rd2], %r1;
    cp.async.wait_all;
    """, pointers=2)  # fmt: skip
    given = numbers(4, 96)
    (found,), faults = run(ptx, given, outputs=[((32,), np.uint32)])
    if further:
        assert "shared read of what was never written" in [fault.kind for fault in faults]
    else:
        assert not faults
        assert (found == given[32 * read :][:32]).all()


@pytest.mark.parametrize(
    "form", ["cp.async.ca.shared.global [%smem], [%g0], 16, 8", "cp.async.cg.shared.global [%smem], [%g0], 8"]
)
def test_copies_that_are_unknown(form: str) -> None:
    with pytest.raises(UnknownInstructionError, match=r"cp\.async"):
        run(kernel(f"{form};", pointers=1), numbers(4, 4))
