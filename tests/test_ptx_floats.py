"""Floating-point instructions of the machine that executes PTX, against exact fractions; what its options change."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from effformer.bench.offline.ptx.machine import Options
from ptx_numbers import BF16, F16, F32, F64, Format, add, divide, extreme, fma, multiply
from ptx_runs import THREADS, Array, Expected, check_rows, operands, read, rows, run

FORMATS: dict[str, Format] = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}
SINGLES = [0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x80800000, 0x00C00000, 0x3F800000, 0xBF800000,
           0x3F800001, 0x3F000000, 0x34000000, 0x33800000, 0x33800001, 0x5F000000, 0x1F800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000,
           0xFF800000, 0x7FC00000, 0x7F800001]  # fmt: skip


def near(rng: random.Random, bits: int = 32) -> int:
    """float32 (or a narrower format in all halves) of similar sizes, so that sums cancel and round."""
    if bits == 32:
        return rng.getrandbits(64) & 0x80FFFFFF80FFFFFF | 0x3E0000003E000000
    return rng.getrandbits(64) & 0x87FF87FF87FF87FF | 0x3800380038003800


@functools.cache
def computed(op: str, form: Format, bits: tuple[int, ...], *, nan: bool) -> int | None:
    """The bits of a result of one format; None where only NaN-ness is known."""
    values = [form.value(one) for one in bits]
    if op in ("min", "max"):
        found = bits[0]
        for other in bits[1:]:
            found = extreme(found, other, form, largest=op == "max", nan=nan)
        return found
    top = 1 << form.size - 1
    if op == "neg":
        return bits[0] ^ top
    if op == "abs":
        return bits[0] & ~top
    if op == "copysign":
        return bits[1] & ~top | bits[0] & top
    if op == "sqrt":
        return square_root(bits[0], form)
    if op == "rcp":
        return divide(1.0, values[0], form)
    if op == "sub":
        return add(values[0], -values[1], form)
    return {"add": add, "mul": multiply, "fma": fma, "div": divide}[op](*values, form)


def square_root(bits: int, form: Format) -> int:
    """Rounded by comparing squares."""
    x = form.value(bits)
    if math.isnan(x) or x < 0:
        return form.bits(math.nan)
    if x == 0 or math.isinf(x):
        return bits
    scale = 1 << 200
    return form.bits(Fraction(math.isqrt(int(Fraction(x) * scale * scale)), scale) + Fraction(1, scale * 16))


def floating(label: str, size: int) -> Expected:
    """What an instruction of one format gives, alone or on pairs."""
    name, _, extra = label.partition(" ")
    op, *modes, kind = name.split(".")
    count = 3 if op == "fma" or extra == "of three" else 1 if op in ("neg", "abs", "sqrt", "rcp") else 2
    if op in ("add", "sub") and "f32" in modes:
        return mixed(op, FORMATS[kind])
    form = FORMATS[kind.removesuffix("x2")]
    exact = form in (F16, BF16) and op not in ("neg", "abs")  # these give the canonical NaN
    parts = 2 if kind.endswith("x2") else 1

    def one(values: tuple[int, ...]) -> int | None:
        if extra == "1":
            values = values[0], form.bits(1.0)
        if "ftz" in modes:
            values = tuple(map(form.flush, values))
        found = computed(op, form, values, nan="NaN" in modes)
        return form.flush(found) if "ftz" in modes and found is not None else found

    def result(a: int, b: int, c: int) -> Callable[[int], bool] | int:
        ones = (1 << form.size) - 1
        found = [one(tuple(word >> form.size * place & ones for word in (a, b, c)[:count])) for place in range(parts)]
        whole = sum((value or 0) << form.size * place for place, value in enumerate(found))
        if exact or not any(form.is_nan(value or 0) for value in found):
            return whole
        return lambda given: all(
            form.same(given >> form.size * place & ones, value or 0) for place, value in enumerate(found)
        )

    return result


def mixed(op: str, form: Format) -> Expected:
    """A half and a float32."""

    def result(a: int, b: int, c: int) -> Callable[[int], bool]:
        y = F32.value(b & 0xFFFFFFFF)
        wanted = add(form.value(a & 0xFFFF), -y if op == "sub" else y, F32)
        return lambda found: F32.same(found, wanted)

    return result


@pytest.mark.parametrize("values", [near, None], ids=["near", "any"])
def test_float_arithmetic(values: Callable[[random.Random], int] | None) -> None:
    """Of pairs, the upper half holds another edge than the lower."""
    edges = [value | SINGLES[-place - 1] << 32 for place, value in enumerate(SINGLES)]
    check_rows("floats", operands(edges if values else edges[::2], 11, values), floating)


def test_fused_sums_round_once() -> None:
    """Products that lie halfway between two float32, with an addend far below: two roundings would give another result."""
    a, b, c = 0x3F800001, 0x3F800001, 0x00000001  # (1 + 2^-23)^2 = 1 + 2^-22 + 2^-46
    triples = [(a, b, c), (a, b, c | 1 << 31)]
    rng = random.Random(12)
    for _ in range(200):
        # 1 + k / 2^12 squared has 24 fraction bits: often a tie; the addend breaks it
        x = F32.bits(1 + rng.randrange(1, 4096, 2) / 4096)
        y = F32.bits(1 + rng.randrange(1, 4096, 2) / 4096)
        triples.append((x, y, rng.choice([0x00000001, 0x80000001, 0x00800000, 0xA0000000, 0x20000000])))
        # a subnormal number and a hair less than half of the least one
        j, sign = rng.randrange(1, 100), rng.getrandbits(1) << 31
        x, y = F32.bits(math.ldexp(2**24 - 2 * j, -100)), F32.bits(math.ldexp(2**23 + j, -97))
        triples.append((x | sign, y, rng.randrange(1, 1 << 23) | rng.getrandbits(1) << 31))
    triples += [triples[0]] * (THREADS - len(triples))
    check_rows("floats", [np.array(values, np.uint64) for values in zip(*triples, strict=True)], floating)


HALVES = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x8400, 0x007F, 0x0080, 0x3C00, 0xBC00, 0x3C01, 0x3F80, 0xBF80, 0x3F81, 0x1400,
          0x3B80, 0x7BFF, 0xFBFF, 0x7F7F, 0xFF7F, 0x7C00, 0xFC00, 0x7F80, 0xFF80, 0x7E00, 0x7FC0, 0x7FFF, 0xC302, 0xC2FE, 0xC2FC, 0xCBC0]  # fmt: skip


@pytest.mark.parametrize("values", [lambda rng: near(rng, 16), None], ids=["near", "any"])
def test_arithmetic_of_halves(values: Callable[[random.Random], int] | None) -> None:
    edges = [value | HALVES[-place - 1] << 16 for place, value in enumerate(HALVES)]
    check_rows("halves", operands(edges, 13, values), floating)


# --- approximate functions --------------------------------------------------------------------------------------------

EXACT: dict[str, Callable[..., float]] = {
    "ex2": lambda x: math.exp2(x) if x < 1024 else math.inf,
    "lg2": lambda x: math.log2(x) if x > 0 else -math.inf if x == 0 else math.nan,
    "rsqrt": lambda x: 1 / math.sqrt(x) if x > 0 else math.copysign(math.inf, x) if x == 0 else math.nan,
    "sqrt": lambda x: math.sqrt(x) if x >= 0 else math.nan,
    "rcp": lambda x: 1 / x if x else math.copysign(math.inf, x),
    "sin": lambda x: math.sin(x) if math.isfinite(x) else math.nan,
    "cos": lambda x: math.cos(x) if math.isfinite(x) else math.nan,
    "tanh": math.tanh,
}


def divided(x: float, y: float, *, approximate: bool) -> float:
    """div.approx gives 0 (NaN for infinity) for divisors beyond 2^126."""
    if approximate and 2.0**126 < abs(y) < math.inf and not math.isnan(x):
        return math.nan if math.isinf(x) else math.copysign(0.0, x) * math.copysign(1, y)
    return F64.value(divide(x, y, F64))


def error(label: str, exact: float) -> float:
    """The documented error of a function of float32, as a difference."""
    op = label.split(".")[0]
    last = math.ldexp(1, max(math.frexp(exact)[1] - 24, -149))
    return {"ex2": 2 * last, "div": 2 * last, "rcp": last, "lg2": max(2.0**-22, 2.0**-22 * abs(exact)),
            "rsqrt": 2.0**-22 * exact, "sqrt": max(2.0**-22 * exact, last), "tanh": 2.0**-11 * abs(exact) + last,
            "sin": 2.0**-20, "cos": 2.0**-20}[op]  # fmt: skip


def function(label: str, a: int, b: int) -> tuple[Format, float, bool]:
    """The format of a result (its lower half, of pairs), the result before it is rounded, and whether it is flushed."""
    op, *modes, kind = label.split(".")
    form, ftz = FORMATS[kind.removesuffix("x2")], "ftz" in modes and kind == "f32"
    x, y = (
        form.value(form.flush(one) if ftz else one)
        for one in (a & (1 << form.size) - 1, b & 0xFFFFFFFF & (1 << form.size) - 1)
    )
    if op == "div":
        return form, divided(x, y, approximate="approx" in modes), ftz
    return form, math.nan if math.isnan(x) else EXACT[op](x), "ftz" in modes


def rounded_function(label: str, size: int) -> Expected:
    """Within a hair of half a unit in the last place: the reference is a float64 itself."""

    def result(a: int, b: int, c: int) -> Callable[[int], bool]:
        form, exact, flushed = function(label, a, b)
        hair = 2.0**-48 * abs(exact) if math.isfinite(exact) else 0.0
        close = {form.bits(exact - hair), form.bits(exact), form.bits(exact + hair)} if hair else {form.bits(exact)}
        wanted = {form.flush(one) for one in close} if flushed else close
        ones = (1 << form.size) - 1
        return lambda found: found & ones in wanted or (form.is_nan(found & ones) and math.isnan(exact))

    return result


RANGE = [
    F32.bits(x)
    for x in (
        2.0,
        0.25,
        3.0,
        10.5,
        -3.75,
        100.0,
        -126.0,
        -127.0,
        -149.0,
        -150.0,
        127.5,
        128.0,
        2.0**-126,
        2.0**126,
        2.0**127,
    )
]


@pytest.mark.parametrize("edges", [SINGLES[:-1:2] + RANGE, HALVES], ids=["f32", "halves"])
def test_functions_are_rounded_correctly_by_default(edges: list[int]) -> None:
    draw: Callable[[random.Random], int] = lambda rng: rng.getrandbits(32) & 0xC7FFFFFF | rng.choice([0x38000000, 0])  # noqa: E731
    check_rows("functions", operands(edges, 14, draw), rounded_function)


def run_functions(options: Options) -> tuple[list[Array], Array]:
    """The words of a run of functions.ptx, and its results of 32 bits."""
    words = operands([0, 0x80000000], 15, lambda rng: F32.bits(rng.uniform(0.01, 3)))
    ran = run(read("functions"), *words, outputs=[((4, THREADS), "u2"), ((21, THREADS), "u4")], options=options)
    assert ran.faults == []
    return words, ran.outputs[1]


def test_approximations_are_off_by_no_more_than_documented() -> None:
    words, found = run_functions(Options(approximate=1.0))
    _, plain = run_functions(Options())
    labels = [label for register, _, label in rows(read("functions")) if register == "%out32"]
    for label, values, correct in zip(labels, found.tolist(), plain.tolist(), strict=True):
        if not label.endswith(".f32"):
            continue
        changed = 0
        for a, b, value, right in zip(words[0].tolist(), words[1].tolist(), values, correct, strict=True):
            exact = function(label, a, b)[1]
            changed += value != right
            if not math.isfinite(exact):
                assert F32.same(value, right), label
            else:
                off = abs(F32.value(value) - exact)
                assert off <= error(label, exact) * (1 + 2.0**-20), f"{label} of {a:#x}, {b:#x}: {off} off"
        assert changed > THREADS // 5, label


def test_equal_seeds_give_equal_errors() -> None:
    first, again, other = (run_functions(Options(approximate=1.0, seed=seed))[1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.3


def test_equal_values_give_equal_errors() -> None:
    words, found = run_functions(Options(approximate=1.0))
    _, place, back = np.unique(words[0], return_index=True, return_inverse=True)
    np.testing.assert_array_equal(found[0], found[0][place[back]])


# --- fusing -----------------------------------------------------------------------------------------------------------

SUMS = """\
.version 8.8
.target sm_90a
.address_size 64
.visible .entry sums(
	.param .u64 sums_param_0,
	.param .u64 sums_param_1
)
.reqntid 32
{
	.reg .pred %p;
	.reg .b32 %t, %a, %b, %c, %d, %e;
	.reg .b64 %in, %out, %o;
	mov.u32 %t, %tid.x;
	mul.wide.u32 %o, %t, 4;
	ld.param.b64 %in, [sums_param_0];
	ld.param.b64 %out, [sums_param_1];
	add.s64 %in, %in, %o;
	add.s64 %out, %out, %o;
	ld.global.b32 %a, [%in];
	ld.global.b32 %b, [%in+128];
	ld.global.b32 %c, [%in+256];
	setp.lt.u32 %p, %t, 16;
	BODY
	st.global.b32 [%out], %d;
	ret;
}
"""
PRODUCT = "mul.f32 %e, %a, %b;"


@pytest.mark.parametrize(
    ("body", "fused"),
    [
        (f"{PRODUCT} add.f32 %d, %e, %c;", lambda a, b, c: fma(a, b, c, F32)),
        (f"{PRODUCT} add.f32 %d, %c, %e;", lambda a, b, c: fma(a, b, c, F32)),
        (f"{PRODUCT} sub.f32 %d, %e, %c;", lambda a, b, c: fma(a, b, -c, F32)),
        (f"{PRODUCT} sub.f32 %d, %c, %e;", lambda a, b, c: fma(-a, b, c, F32)),
        (f"{PRODUCT} mov.b32 %t, %a; add.f32 %d, %c, %e;", lambda a, b, c: fma(a, b, c, F32)),
        ("mul.rn.f32 %e, %a, %b; add.f32 %d, %e, %c;", None),
        (f"{PRODUCT} add.rn.f32 %d, %e, %c;", None),
        ("mul.rn.f32 %e, %a, %b; add.rn.f32 %d, %e, %c;", None),
        (f"@%p {PRODUCT} @!%p {PRODUCT} add.f32 %d, %e, %c;", None),
        (f"{PRODUCT} mul.rn.f32 %e, %a, %b; add.f32 %d, %e, %c;", None),
        (f"{PRODUCT} mov.b32 %a, %c; add.f32 %d, %e, %c;", None),
    ],
)  # fmt: skip
def test_only_sums_without_rounding_are_fused(body: str, fused: Callable[[float, float, float], int] | None) -> None:
    rng = np.random.default_rng(16)
    given = rng.uniform(0.5, 1.5, (3, 32)).astype(np.float32)
    given[2] = (1 if "sub" in body else -1) * given[0] * given[1]  # what rounding left off is all there is
    ptx = SUMS.replace("BODY", body)
    plain, wanted = [], []
    for a, b, c in given.T.tolist():
        product = F32.value(multiply(a, b, F32))
        minus_c, minus_product = "sub.f32 %d, %e" in body, "sub.f32 %d, %c" in body
        plain.append(add(-product if minus_product else product, -c if minus_c else c, F32))
        wanted.append(fused(a, b, c) if fused else plain[-1])
    for fuse, expected in ((False, plain), (True, wanted)):
        (found,) = run(ptx, given, outputs=[(32, "u4")], options=Options(fuse=fuse)).outputs
        assert found.tolist() == expected
    assert (plain != wanted) == (fused is not None)
