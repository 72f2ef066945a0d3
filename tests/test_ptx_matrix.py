"""Products of warps and warpgroups in hand-written PTX, against products of whole numbers in float64."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from effformer.bench.offline.ptx.machine import Options
from effformer.bench.offline.ptx.registry import UnknownInstructionError
from ptx_memory_runs import kernel, names, result, run
from ptx_operands import SIZE, a_places, b_places, c_places, descriptor, encoded, fill, tile, whole
from ptx_runs import Array

SHAPES = [("bf16", 16), ("f16", 16), ("bf16", 8), ("f16", 8), ("tf32", 8), ("tf32", 4)]


def warp_product(kind: str, depth: int, target: str = "sm_90a", name: str = "") -> str:
    """A, B, C and the result are fragments."""
    words = depth * SIZE[kind] // 16
    loads = ""
    for place, (count, first) in enumerate(((2 * words, 10), (words, 20), (4, 30))):
        vector = f".v{count}" if count > 1 else ""
        loads += f"""
    mad.wide.u32 %rd1, %t, {4 * count}, %g{place};
    ld.global{vector}.b32 {names("r", count, first)}, [%rd1];"""
    name = name or f"m16n8k{depth}.row.col.f32.{kind}.{kind}.f32"
    return kernel(f"""{loads}
    mma.sync.aligned.{name} {names("r", 4, 40)}, {names("r", 2 * words, 10)}, {names("r", words, 20)}, {names("r", 4, 30)};
    mad.wide.u32 %rd1, %t, 16, %g3;
    st.global.v4.b32 [%rd1], {names("r", 4, 40)};
    """, pointers=4, target=target)  # fmt: skip


def multiplied(a: Array, b: Array, c: Array, kind: str, **options: Any) -> Array:
    """[16, depth] · [depth, 8] + [16, 8] by one warp; a and b as bits."""
    depth = a.shape[1]
    given = [np.ascontiguousarray(one) for one in (a[a_places(kind, depth)], b[b_places(kind, depth)], c[c_places(8)])]
    target = options.pop("target", "sm_90a")
    fragment = result(warp_product(kind, depth, target), *given, output=((32, 4), np.float32), **options)
    found = np.full((16, 8), np.nan, np.float32)
    found[c_places(8)] = fragment
    return found


@pytest.mark.parametrize(("kind", "depth"), SHAPES)
def test_products_of_a_warp(kind: str, depth: int) -> None:
    a, b, c = whole(0, 16, depth), whole(1, depth, 8), whole(2, 16, 8).astype(np.float32)
    assert (multiplied(encoded(a, kind), encoded(b, kind), c, kind) == a @ b + c).all()


def test_tf32_ignores_the_lowest_bits() -> None:
    a, b, c = whole(0, 16, 8), whole(1, 8, 8), np.zeros((16, 8), np.float32)
    assert (multiplied(encoded(a, "tf32") | np.uint32(0x1FFF), encoded(b, "tf32"), c, "tf32") == a @ b).all()


@pytest.mark.parametrize("name", ["m16n8k16.row.col.f16.f16.f16.f16", "m16n8k4.row.col.f32.bf16.bf16.f32"])
def test_products_that_are_unknown(name: str) -> None:
    given = [np.zeros((32, count), np.uint32) for count in (4, 2, 4)]
    with pytest.raises(UnknownInstructionError, match=name):
        run(warp_product("bf16", 16, name=name), *given, outputs=[((32, 4), np.float32)])


# --- sums cut off as on GPUs ----------------------------------------------------------------------------------------------


def exponent(x: Fraction, least: int) -> int:
    return max(math.frexp(float(x))[1] - 1, least)


def towards_zero(x: Fraction) -> float:
    if not x:
        return 0.0
    unit = Fraction(2) ** (exponent(x, -126) - 23)
    return float(math.trunc(x / unit) * unit)


def cut_off(a: list[Fraction], b: list[Fraction], c: Fraction, extra: int, least: int) -> Fraction:
    """One sum of products and an accumulator. Products are not normalised before they are aligned."""
    addends = [(x * y, exponent(x, least) + exponent(y, least)) for x, y in zip(a, b, strict=True)] + [
        (c, exponent(c, -126))
    ]
    addends = [(value, power) for value, power in addends if value]
    if not addends:
        return Fraction(0)
    unit = Fraction(2) ** (max(power for _, power in addends) - 23 - extra)
    return Fraction(towards_zero(sum(math.trunc(value / unit) for value, _ in addends) * unit))


def decoded(bits: Array, kind: str) -> Array:
    """The values as Python's fractions."""
    if kind == "f16":
        values = bits.view(np.float16)
    else:
        values = (bits if kind == "tf32" else bits.astype(np.uint32) << 16).view(np.float32)
    return np.vectorize(Fraction, otypes=[object])(values.astype(np.float64))


def drawn(random: np.random.Generator, kind: str, spread: int, *shape: int) -> Array:
    """Bits of numbers of many exponents; some are zero, those of float16 may be subnormal."""
    values = random.normal(size=shape) * 2.0 ** random.integers(-spread, spread, shape) * (random.random(shape) > 0.1)
    bits = encoded(values, kind)
    return bits & np.uint32(0xFFFFE000) if kind == "tf32" else bits


@pytest.mark.parametrize("spread", [1, 4, 12])
@pytest.mark.parametrize(("target", "extra", "depths"), [("sm_80", 1, (8, 4)), ("sm_86", 1, (8, 4)), ("sm_90a", 2, (16, 8)),
                                                         ("sm_100a", 2, (16, 8))])  # fmt: skip
@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_sums_are_cut_off(kind: str, target: str, extra: int, depths: tuple[int, int], spread: int) -> None:
    depth = 32 // SIZE[kind]
    random = np.random.default_rng(spread)
    a, b = drawn(random, kind, spread, 16, depth), drawn(random, kind, spread, depth, 8)
    c = (random.normal(size=(16, 8)) * 2.0 ** random.integers(-spread, spread, (16, 8))).astype(np.float32)
    c[::2] = -decoded(a, kind)[::2, 0, None].astype(float) * decoded(b, kind)[0].astype(float)  # what is left is small
    found = multiplied(a, b, c, kind, target=target, options=Options(truncate=True))
    x, y, step = decoded(a, kind), decoded(b, kind), depths[SIZE[kind] == 4]
    for row in range(16):
        for column in range(8):
            total = Fraction(float(c[row, column]))
            for k in range(0, depth, step):
                part = slice(k, k + step)
                total = cut_off(list(x[row, part]), list(y[part, column]), total, extra, -14 if kind == "f16" else -126)
            assert Fraction(float(found[row, column])) == total


def test_products_are_aligned_before_they_are_normalised() -> None:
    """1.5 * 1.5 - 2.25 + 2**-25: the bit is kept where the largest exponent is 0, that of 1.5 * 1.5, and not 1."""
    a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.full((16, 8), -2.25, np.float32)
    a[:, 0], b[0], b[1] = 1.5, 1.5, 1
    for bit, expected in ((2.0**-25, 0), (2.0**-24, 2.0**-24)):  # c's exponent is 1
        a[:, 1] = bit
        found = multiplied(encoded(a, "bf16"), encoded(b, "bf16"), c, "bf16", options=Options(truncate=True))
        assert (found == expected).all()
    a[:, 2], b[2], c[:] = -1.5, 1.5, 0
    a[:, 1] = 2.0**-25
    found = multiplied(encoded(a, "bf16"), encoded(b, "bf16"), c, "bf16", options=Options(truncate=True))
    assert (found == 2.0**-25).all()


def test_subnormal_numbers_have_the_least_exponent() -> None:
    """2**-20 as float16 has exponent -14: of sums with it, 2**-40 is cut off."""
    a, b, c = np.zeros((16, 16)), np.ones((16, 8)), np.full((16, 8), 2.0**-40, np.float32)
    for kind, expected in (("f16", 2.0**-20), ("bf16", 2.0**-20 + 2.0**-40)):
        a[:, 3] = 2.0**-20
        found = multiplied(encoded(a, kind), encoded(b, kind), c, kind, options=Options(truncate=True))
        assert (found == expected).all()


def test_too_large_sums_become_infinite() -> None:
    a, b, c = np.full((16, 16), 2.0**100), np.full((16, 8), 2.0**27), np.zeros((16, 8), np.float32)
    a[8:] *= -1
    found = multiplied(encoded(a, "bf16"), encoded(b, "bf16"), c, "bf16", options=Options(truncate=True))
    assert (found == np.where(np.arange(16)[:, None] < 8, np.inf, -np.inf)).all()


# --- products of a warpgroup ----------------------------------------------------------------------------------------------

MODES = {16: 0, 128: 1, 64: 2, 32: 3}  # bits 62 and 63 of a descriptor, by bytes of a swizzled row


def group_product(
    a: Array,
    b: Array,
    c: Array,
    kind: str,
    span: int,
    *,
    a_depth_first: bool = True,
    b_depth_first: bool = True,
    from_registers: bool = False,
    keep: bool = True,
    waits: tuple[int, ...] = (0,),
) -> Array:
    """[programs, groups * 64, depth] · [programs, columns, depth]^T + c by `groups` warpgroups."""
    programs, rows, depth = a.shape
    columns, groups, size = b.shape[1], rows // 64, SIZE[kind]
    threads, per_step = 128 * groups, 32 // SIZE[kind]
    a_tiles = [[tile(one[64 * n :][:64], kind, span, depth_first=a_depth_first) for n in range(groups)] for one in a]
    b_tiles = [tile(one, kind, span, depth_first=b_depth_first) for one in b]
    images = [np.concatenate([*(part.image for part in parts), other.image])
              for parts, other in zip(a_tiles, b_tiles, strict=True)]  # fmt: skip
    image, one, other = np.stack(images), a_tiles[0][0], b_tiles[0]
    row, column = a_places(kind, per_step)
    row = (np.arange(rows // 16)[:, None, None] * 16 + row).reshape(threads, -1)
    at = (
        np.tile(column, (rows // 16, 1))[:, None, :] + np.arange(0, depth, per_step)[:, None]
    )  # [threads, steps, elements]
    a_fragments = np.ascontiguousarray(encoded(a, kind)[:, row[:, None, :], at])
    row, column = c_places(columns)
    row, column = (
        (np.arange(rows // 16)[:, None, None] * 16 + row).reshape(threads, -1),
        np.tile(column, (rows // 16, 1)),
    )
    steps, count = depth // per_step, columns // 2
    form = f"wgmma.mma_async.sync.aligned.m64n{columns}k{per_step}.f32.{kind}.{kind} {names('c', count)}"
    flags = (
        ""
        if size == 4
        else f", {int(not b_depth_first)}"
        if from_registers
        else f", {int(not a_depth_first)}, {int(not b_depth_first)}"
    )
    body = [
        fill(image.shape[1], threads),
        "mov.u32 %r0, %ctaid.x; mad.lo.u32 %r0, %r0, %threads, %t;",
        f"mad.wide.u32 %rd1, %r0, {16 * steps}, %g1; mad.wide.u32 %rd2, %r0, {4 * count}, %g2; mad.wide.u32 %rd3, %r0, {4 * count}, %g3;",
        *(f"ld.global.v4.b32 {names('r', 4, 10 + 4 * n)}, [%rd1 + {16 * n}];" for n in range(steps)),
        *(f"ld.global.v4.b32 {names('c', 4, n)}, [%rd2 + {4 * n}];" for n in range(0, count, 4)),
        descriptor("%rd5", 0, one.descriptor | MODES[span] << 62),
        f"shr.u32 %r0, %t, 7; mad.wide.u32 %rd5, %r0, {len(one.image) >> 4}, %rd5;",
        descriptor("%rd6", groups * len(one.image), other.descriptor | MODES[span] << 62),
        f"setp.ne.u32 %p1, {int(keep)}, 0; setp.eq.u32 %p2, 0, 0;",
        "wgmma.fence.sync.aligned;",
    ]
    for n in range(steps):
        left = names("r", 4, 10 + 4 * n) if from_registers else "%rd5"
        body.append(f"{form}, {left}, %rd6, %p{2 if n else 1}, 1, 1{flags};")
        body.append(f"add.s64 %rd5, %rd5, {one.step >> 4}; add.s64 %rd6, %rd6, {other.step >> 4};")
        body += ["wgmma.commit_group.sync.aligned;"] if len(waits) > 1 else []
    body += ["wgmma.commit_group.sync.aligned;"] if len(waits) == 1 else []
    body += [f"wgmma.wait_group.sync.aligned {n};" for n in waits]
    body += [f"st.global.v4.b32 [%rd3 + {4 * n}], {names('c', 4, n)};" for n in range(0, count, 4)]
    ptx = kernel("\n".join(body), pointers=4, threads=threads)
    fragments = np.ascontiguousarray(c.astype(np.float32)[:, row, column])
    found = result(ptx, image, a_fragments, fragments, output=(fragments.shape, np.float32), programs=programs)
    whole_result = np.full(c.shape, np.nan)
    whole_result[:, row, column] = found
    return whole_result


def group_case(
    kind: str, span: int, columns: int = 64, programs: int = 1, groups: int = 1
) -> tuple[Array, Array, Array]:
    depth = max(span, 64) // SIZE[kind] if span == 16 else span // SIZE[kind]
    return (
        whole(3, programs, 64 * groups, depth),
        whole(4, programs, columns, depth),
        whole(5, programs, 64 * groups, columns),
    )


def product(a: Array, b: Array, c: Array) -> Array:
    return a @ b.swapaxes(1, 2) + c


@pytest.mark.parametrize("from_registers", [False, True])
@pytest.mark.parametrize("span", MODES)
@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_products_of_a_warpgroup(kind: str, span: int, from_registers: bool) -> None:
    case = group_case(kind, span)
    assert (group_product(*case, kind, span, from_registers=from_registers) == product(*case)).all()


@pytest.mark.parametrize(("a_depth_first", "b_depth_first"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("span", MODES)
def test_transposed_operands(span: int, a_depth_first: bool, b_depth_first: bool) -> None:
    case = group_case("bf16", span)
    found = group_product(*case, "bf16", span, a_depth_first=a_depth_first, b_depth_first=b_depth_first)
    assert (found == product(*case)).all()


@pytest.mark.parametrize("columns", [8, 16, 32, 256])
def test_widths_of_products(columns: int) -> None:
    case = group_case("f16", 64, columns)
    assert (group_product(*case, "f16", 64) == product(*case)).all()


def test_accumulators_that_are_not_kept() -> None:
    a, b, c = group_case("bf16", 128)
    found = group_product(a, b, np.full_like(c, np.nan), "bf16", 128, keep=False)
    assert (found == product(a, b, np.zeros_like(c))).all()


def test_groups_of_products_and_programs() -> None:
    """Two warpgroups of two programs; each product is a group of its own, which one wait after the other ends."""
    case = group_case("tf32", 128, programs=2, groups=2)
    assert (group_product(*case, "tf32", 128, waits=(3, 2, 1, 0)) == product(*case)).all()
