"""Control flow, parsing, warps and faults of the machine that executes PTX."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import numpy as np
import pytest
from effformer.bench.offline.ptx.machine import Options
from effformer.bench.offline.ptx.program import parse
from ptx_runs import THREADS, operands, read, rows, run


def signed(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def lanes_of_control(first: list[int], second: list[int]) -> dict[str, list[int]]:
    """What control.ptx must store: each lane on its own, and what warps exchange."""
    found: dict[str, list[int]] = {}
    pairs = [(signed(a), signed(b), a & 15) for a, b in zip(first, second, strict=True)]
    found["predicated arithmetic"] = [a + 100 if a < b else a * 3 for a, b, _ in pairs]
    found["predicated load"] = [b if a < b else 7 for a, b, _ in pairs]
    found["predicated store"] = [a if a < b else 9 for a, b, _ in pairs]
    found["predicated comparison"] = [int(low == 3 if a < b else a >= 0) for a, b, low in pairs]
    branches = [(9 if low == 9 else b - low) if low > 7 else (b + low if low > 3 else b * 5) ^ 1 for _, b, low in pairs]
    found["nested branches"] = [branches[lane ^ 1] for lane in range(len(pairs))]
    sums = [nested_sum(low) for _, _, low in pairs]
    warps = [range(start, start + 32) for start in range(0, len(pairs), 32)]
    found["loops"] = [
        sums[lane][0] + (1000 if any(sums[other][1] for other in warp) else 0) for warp in warps for lane in warp
    ]
    found["a rotated loop"] = [value for warp in warps for value in rotated([pairs[lane][2] for lane in warp])]
    counts = [max(2, low + low % 2) for _, _, low in pairs]
    found["scopes"] = [count + (50 if count > 10 else 0) + count + 1 for count in counts]
    found["early return"] = [5 if low < 4 else low if low < 8 else low + 100 for _, _, low in pairs]
    return {name: [value & 0xFFFFFFFF for value in values] for name, values in found.items()}


def nested_sum(trips: int) -> tuple[int, bool]:
    """The sum, and whether the loop was left in its middle."""
    total = 0
    for outer in range(trips):
        for inner in range(outer + 1):
            total += inner
            if total > 200:
                return total, True
    return total, False


def rotated(lows: list[int]) -> list[int]:
    totals, agreed = [0] * 32, 0
    for _ in range(2):
        for trip in range(6):
            totals = [total + (2 if (trip + low) % 2 == 0 else 3) for total, low in zip(totals, lows, strict=True)]
            agreed += all(total > 8 for total in totals)
    return [100 * total + agreed for total in totals]


@pytest.mark.parametrize("same", [False, True], ids=["by lane", "by warp"])
@pytest.mark.parametrize("programs", [1, 3])
def test_control_flow(same: bool, programs: int) -> None:
    first, second, third = operands([0, 3, 9, 15, 0x80000000, 2**32 - 1], 21)
    if same:
        first, second = (
            first.reshape(-1, 32)[:, :1].repeat(32, 1).reshape(-1),
            second.reshape(-1, 32)[:, :1].repeat(32, 1).reshape(-1),
        )
    names = [comment for _, _, comment in rows(read("control"))]
    ran = run(read("control"), first, second, third, outputs=[((len(names), THREADS), "u4")], programs=1)
    assert list(map(str, ran.faults)) == []
    expected = lanes_of_control(*((words & 0xFFFFFFFF).tolist() for words in (first, second)))
    assert list(expected) == names
    for name, values in zip(names, ran.outputs[0].tolist(), strict=True):
        assert values == expected[name], name
    # Several programs at once store the same values to the same places, which is a race, and all that is wrong.
    if programs > 1:
        many = run(read("control"), first, second, third, outputs=[((len(names), THREADS), "u4")], programs=programs)
        assert {fault.kind.partition(":")[0] for fault in many.faults} == {"global race"}
        np.testing.assert_array_equal(many.outputs[0], ran.outputs[0])


# --- warps ------------------------------------------------------------------------------------------------------------


def shuffled(mode: str, lane: int, by: int, clamp: int) -> tuple[int, bool]:
    """The lane that is read, and whether it is within the segment, as the PTX ISA has it."""
    by, segment, last = by & 31, clamp >> 8 & 31, clamp & 31
    most, least = (lane & segment) | (last & ~segment & 31), lane & segment
    other = {"bfly": lane ^ by, "idx": least | (by & ~segment & 31), "up": lane - by, "down": lane + by}[mode]
    valid = other >= most if mode == "up" else other <= most
    return (other if valid else lane), valid


FIXED = {"bfly": lambda lane: lane ^ 16, "idx": lambda lane: lane & 28 | 1, "up": lambda lane: lane - 3 if lane >= 3 else lane,
         "down": lambda lane: lane + 2 if lane % 8 < 6 else lane}  # fmt: skip
REDUCTIONS: dict[str, Callable[[list[int]], int]] = {
    "add.s32": sum, "add.u32": sum, "min.u32": min, "max.u32": max, "and.b32": lambda a: functools.reduce(operator.and_, a),
    "or.b32": lambda a: functools.reduce(operator.or_, a), "xor.b32": lambda a: functools.reduce(operator.xor, a),
    "min.s32": lambda a: min(map(signed, a)), "max.s32": lambda a: max(map(signed, a)),
}  # fmt: skip


def exchanged(name: str, a: list[int], b: list[int], c: list[int]) -> list[int]:
    """What the lanes of a warp get."""
    op, _, rest = name.partition(".")
    if op == "shfl":
        mode, _, form = rest.partition(" ")
        if form == "fixed":
            return [a[FIXED[mode](lane)] for lane in range(32)]
        found = [shuffled(mode, lane, b[lane], c[lane]) for lane in range(32)]
        return [int(valid) if form == "valid" else a[other] for other, valid in found]
    on = [signed(x) < signed(y) for x, y in zip(a, b, strict=True)]
    if op == "vote":
        ballot = sum(value << lane for lane, value in enumerate(on))
        value = {"all": all(on), "any": any(on), "uni": len(set(on)) == 1, "ballot": ballot}[rest]
        return [int(value)] * 32
    if op == "redux":
        return [REDUCTIONS[rest](a) & 0xFFFFFFFF] * 32
    return {"elect": [0] * 32, "elected": [1] + [0] * 31}[name]


def test_warps() -> None:
    words = operands([0, 1, 31, 0x1F, 0x1C1F, 0x181F, 0x1F1F, 0x80000000, 0x7FFFFFFF, 0xFFFFFFFF], 22)
    for place, pair in enumerate([(0, 1), (1, 0), (7, 7)]):  # warps that agree
        for word, value in zip(words, pair, strict=False):
            word[32 * place : 32 * place + 32] = value
    found = rows(read("warps"))
    ran = run(read("warps"), *words, outputs=[((len(found), THREADS), "u4")])
    assert ran.faults == []
    a, b, c = ((value & 0xFFFFFFFF).tolist() for value in words)
    for (_, _, name), values in zip(found, ran.outputs[0].tolist(), strict=True):
        for start in range(0, THREADS, 32):
            part = slice(start, start + 32)
            assert values[part] == exchanged(name, a[part], b[part], c[part]), name


# --- faults -----------------------------------------------------------------------------------------------------------

SHORT = """\
.version 8.8
.target sm_90a
.address_size 64
.visible .entry short(
	.param .u64 short_param_0
)
.reqntid 64
{
	.reg .pred %p<5>;
	.reg .b32 %r<9>;
	.reg .b64 %rd<5>;
	.file 1 "/kernels/short.py"
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd1, %r1, 4;
	ld.param.b64 %rd2, [short_param_0];
	add.s64 %rd2, %rd2, %rd1;
	setp.lt.u32 %p1, %r1, 16;
	setp.lt.u32 %p2, %r1, 32;
	mov.b32 %r2, 5;
	.loc 1 7 3
	BODY
	.loc 1 9 3
$end:
	ret;
}
"""
LINE = SHORT.splitlines().index("\tBODY") + 1
WHOLE = SHORT.replace("BODY", "mov.b32 %r3, %r1;")
UNWRITTEN = "a register is read before it is written"
PARTLY = "a barrier that not all threads of a program reach"


def faults_of(body: str) -> list[tuple[str, int, str, str, int]]:
    ran = run(SHORT.replace("BODY", body.replace("\n", " ")), outputs=[(64, "u4")])
    return [(fault.kind, fault.line, fault.source, fault.detail, fault.count) for fault in ran.faults]


@pytest.mark.parametrize(
    ("body", "kinds", "detail", "count"),
    [
        ("add.s32 %r3, %r4, %r2;", [UNWRITTEN], "%r4", 1),
        ("add.s32 %r4, %r4, %r2;", [UNWRITTEN], "%r4", 1),
        ("fma.rn.f32 %r3, %r4, %r2, %r5;", [UNWRITTEN], "%r4, %r5", 1),
        ("mov.b32 %r3, %r4;", [UNWRITTEN], "%r4", 1),
        ("st.global.b32 [%rd2], %r4;", [UNWRITTEN], "%r4", 1),
        ("cvt.rn.f32.s32 %r3, %r4;", [UNWRITTEN], "%r4", 1),
        ("shfl.sync.bfly.b32 %r3|%p4, %r4, 1, 31, -1;", [UNWRITTEN], "%r4", 1),
        ("selp.b32 %r3, 1, 0, %p3;", [UNWRITTEN], "%p3", 1),
        ("@%p1 bra $end; bar.sync 0;", [PARTLY, "bar by a part of a warp"], "", 1),
        ("@%p2 bra $end; bar.sync 0;", [PARTLY], "", 32),
        ("@%p2 ret; bar.sync 0;", [PARTLY], "some have left", 1),
        ("@%p2 ret; barrier.sync 0; bar.sync 0;", [PARTLY], "some have left", 2),
        ("@%p1 bra $end; shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;", ["shfl by a part of a warp"], "", 1),
        ("@%p1 bra $end; vote.sync.any.pred %p3, %p1, -1;", ["vote by a part of a warp"], "", 1),
        ("@%p1 bra $end; redux.sync.add.s32 %r3, %r2, -1;", ["redux by a part of a warp"], "", 1),
        ("@%p1 bra $end; elect.sync %r3|%p3, -1;", ["elect by a part of a warp"], "", 1),
        ("@%p1 bra $end; bar.warp.sync -1;", ["bar by a part of a warp"], "", 1),
        ("@%p2 bra $end; bar.warp.sync -1;", [], "", 0),
        ("@%p2 bra $other; bar.sync 0; bra.uni $end; $other: bar.sync 0;", [], "", 0),
        ("@%p1 bra $other; mov.b32 %r2, 1; $other: bar.sync 0;", [], "", 0),
    ],
)  # fmt: skip
def test_faults_name_the_lines(body: str, kinds: list[str], detail: str, count: int) -> None:
    found = faults_of(body)
    assert sorted(kind for kind, *_ in found) == kinds
    assert all(fault[1:3] == (LINE, "short.py:7") for fault in found)
    if len(found) == 1:
        assert found[0][3:] == (detail, count)


@pytest.mark.parametrize(
    "body",
    ["@%p3 mov.b32 %r2, 1;", "@!%p3 mov.b32 %r3, 1;", "@%p3 bra $end;", "@!%p3 bra $end;",
     "@%p3 st.global.b32 [%rd2], %r2;", "@%p3 ret;"],
)  # fmt: skip
def test_a_predicate_that_nothing_wrote_is_a_fault(body: str) -> None:
    assert faults_of(body) == [(UNWRITTEN, LINE, "short.py:7", "%p3", 1)]


def test_faults_do_not_change_what_others_compute() -> None:
    body = "add.s32 %r3, %r4, %r2; @%p1 bra $end; st.global.b32 [%rd2], %r2;"
    ran = run(SHORT.replace("BODY", body), outputs=[(64, "u4")])
    assert ran.outputs[0].tolist() == [0] * 16 + [5] * 48


def test_instructions_are_counted() -> None:
    ran = run(
        SHORT.replace("BODY", "@%p2 bra $end; add.f32 %r3, %r2, %r2;"),
        outputs=[(64, "u4")],
        options=Options(count=True),
    )
    assert ran.counts["fp32"] == 1
    assert ran.counts["control"] == 4  # a branch and a return of two warps


# --- parsing ----------------------------------------------------------------------------------------------------------


def test_a_program_is_read() -> None:
    program = parse(read("control"))
    assert (program.name, program.target, program.capability, program.threads) == ("control", "sm_90a", 90, 512)
    assert program.parameters == [(f"control_param_{place}", "u64") for place in range(4)]
    assert {program.registers[name] for name in ("%p1", "%r1", "%rd1")} == {"pred", "b32", "b64"}
    assert "%r0" in program.registers
    assert "%r30" not in program.registers
    lines = read("control").splitlines()
    for one in program.instructions:
        assert one.text in lines[one.line - 1]


@pytest.mark.parametrize("text", ["5add.s32 %r3, %r1, %r2;", "@ add.s32 %r3;", "/* note */ mov.b32 %r3, %r1;", ".shared .b8 a[8];",
                                  "bra $nowhere;", "}}", "{ { mov.b32 %r3, %r1; } } }"])  # fmt: skip
def test_what_is_no_statement_is_refused_with_its_line(text: str) -> None:
    with pytest.raises(ValueError, match=f"PTX line {LINE}: "):
        parse(SHORT.replace("BODY", text))


@pytest.mark.parametrize(
    "ptx",
    ["", "// nothing", WHOLE.replace(".reqntid 64", ""), WHOLE.rpartition("}")[0], WHOLE.replace("\tret;", "\tret"), WHOLE + WHOLE.replace("short", "other")],
    ids=["empty", "comment", "no threads", "no end", "no semicolon", "two kernels"],
)  # fmt: skip
def test_what_is_no_kernel_is_refused(ptx: str) -> None:
    with pytest.raises(ValueError, match="one kernel"):
        parse(ptx)


def test_threads_of_several_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="PTX line 7: got '.reqntid 8, 8, 1', allowed are threads of one axis"):
        parse(WHOLE.replace(".reqntid 64", ".reqntid 8, 8, 1"))
    assert parse(WHOLE.replace(".reqntid 64", ".reqntid 64, 1, 1")).threads == 64


def test_a_branch_out_of_a_scope() -> None:
    body = (
        "$top: add.s32 %r2, %r2, 1; { .reg .pred %q; setp.lt.u32 %q, %r2, 9; @%q bra $top; } st.global.b32 [%rd2], %r2;"
    )
    named = body.replace("$top", "top")
    for text in (body, named, f"{{ {named} }}"):
        ran = run(SHORT.replace("BODY", text), outputs=[(64, "u4")])
        assert ran.faults == []
        assert ran.outputs[0].tolist() == [9] * 64


# --- launches ---------------------------------------------------------------------------------------------------------

PLACES = """\
.version 8.8
.target sm_90a
.address_size 64
.visible .entry places(
	.param .u64 places_param_0,
	.param .s32 places_param_1,
	.param .u16 places_param_2
)
.reqntid 64
{
	.reg .b16 %h1;
	.reg .b32 %r<9>;
	.reg .b64 %rd<3>;
	mov.u32 %r1, %tid.x;
	mov.u32 %r2, %ctaid.x;
	mov.u32 %r3, %ntid.x;
	mad.lo.s32 %r4, %r2, %r3, %r1;
	ld.param.u64 %rd1, [places_param_0];
	mul.wide.u32 %rd2, %r4, 4;
	add.s64 %rd1, %rd1, %rd2;
	ld.param.s32 %r5, [places_param_1];
	ld.param.u16 %h1, [places_param_2];
	cvt.u32.u16 %r6, %h1;
	mov.u32 %r7, %nctaid.x;
	add.s32 %r5, %r5, %r6;
	mad.lo.s32 %r5, %r7, %r4, %r5;
	mov.u32 %r6, %laneid;
	mad.lo.s32 %r5, %r6, 1000, %r5;
	mov.u32 %r6, %warpid;
	mad.lo.s32 %r5, %r6, 100000, %r5;
	st.global.b32 [%rd1], %r5;
	ret;
}
"""


@pytest.mark.parametrize("programs", [1, 200])
def test_programs_know_their_places(programs: int) -> None:
    """200 programs of 64 threads are more than run at a time."""
    ran = run(PLACES, outputs=[(programs * 64, "i4")], programs=programs, scalars=[-5 & 0xFFFFFFFF, 0xFFFF])
    assert ran.faults == []
    expected = [programs * i - 5 + 0xFFFF + i % 32 * 1000 + i % 64 // 32 * 100000 for i in range(programs * 64)]
    assert ran.outputs[0].tolist() == expected


def test_parameters_are_those_of_the_kernel() -> None:
    with pytest.raises(ValueError, match="parameters: got 2, allowed are the 3 of places"):
        run(PLACES, outputs=[(64, "u4")], scalars=[1])
