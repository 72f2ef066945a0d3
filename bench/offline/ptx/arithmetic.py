"""Arithmetic of integers and of floating-point numbers, lane by lane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .numbers import (
    F16,
    F32,
    F64,
    TYPES,
    U16,
    U32,
    U64,
    Array,
    flush,
    flush_half,
    fma,
    fma_half,
    from_bf16,
    high_product,
    narrow,
    quotient,
)
from .registry import Step, UnknownInstructionError, instruction

if TYPE_CHECKING:
    from .machine import Machine
    from .program import Instruction

_TWO: dict[str, Callable[..., Array]] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_WIDE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}

# --- integers ---------------------------------------------------------------------------------------------------------


@instruction(r"(?P<op>add|sub)\.(?P<kind>[sub](?:16|32|64))")
def add_integers(m: Machine, i: Instruction, op: str, kind: str) -> Step:
    return m.lanewise(i, [kind] * 2, _TWO[op])


@instruction(r"(?P<op>mul|mad)\.(?P<part>lo|hi|wide)\.(?P<kind>[su](?:16|32|64))")
def multiply_integers(m: Machine, i: Instruction, op: str, part: str, kind: str) -> Step:
    result = _WIDE.get(kind) if part == "wide" else kind
    if result is None:
        raise UnknownInstructionError(i)
    wide = TYPES[result]

    def product(a: Array, b: Array) -> Array:
        if part == "wide":
            return a.astype(wide) * b.astype(wide)
        return a * b if part == "lo" else high_product(a, b)

    if op == "mul":
        return m.lanewise(i, [kind] * 2, product)
    return m.lanewise(i, [kind, kind, result], lambda a, b, c: product(a, b) + c)


@instruction(r"(?P<op>div|rem)\.(?P<kind>[su](?:16|32|64))")
def divide_integers(m: Machine, i: Instruction, op: str, kind: str) -> Step:
    if op == "div":
        return m.lanewise(i, [kind] * 2, quotient)
    return m.lanewise(i, [kind] * 2, lambda a, b: a - quotient(a, b) * b)


@instruction(r"(?P<op>min|max)\.(?P<kind>[su](?:16|32|64))")
def extreme_integers(m: Machine, i: Instruction, op: str, kind: str) -> Step:
    return m.lanewise(i, [kind] * 2, np.minimum if op == "min" else np.maximum)


@instruction(r"(?P<op>neg|abs)\.(?P<kind>s(?:16|32|64))")
def change_sign_of_integers(m: Machine, i: Instruction, op: str, kind: str) -> Step:
    return m.lanewise(i, [kind], np.negative if op == "neg" else np.abs)


# --- float32 and float64 ----------------------------------------------------------------------------------------------


def _flushing(function: Callable[..., Array], ftz: object) -> Callable[..., Array]:
    if not ftz:
        return function
    return lambda *values: flush(function(*map(flush, values)))


@instruction(r"(?P<op>add|sub|mul)(?:\.rn)?(?P<ftz>\.ftz)?\.(?P<kind>f32|f64)")
def add_floats(m: Machine, i: Instruction, op: str, ftz: str | None, kind: str) -> Step:
    return m.lanewise(i, [kind] * 2, _flushing(_TWO[op], ftz))


@instruction(r"(?P<op>add|sub)(?:\.rn)?\.f32\.(?P<kind>bf16|f16)")
def add_half_to_float(m: Machine, i: Instruction, op: str, kind: str) -> Step:
    widen = from_bf16 if kind == "bf16" else lambda a: a.view(F16).astype(F32)
    return m.lanewise(i, ["b16", "f32"], lambda a, b: _TWO[op](widen(a), b))


@instruction(r"fma\.rn(?P<ftz>\.ftz)?\.f32")
def fused_multiply_add(m: Machine, i: Instruction, ftz: str | None) -> Step:
    return m.lanewise(i, ["f32"] * 3, _flushing(fma, ftz))


@instruction(r"(?P<op>add|sub|mul|fma)(?:\.rn)?\.f32x2")
def pairs_of_floats(m: Machine, i: Instruction, op: str) -> Step:
    """Two float32 in 64 bits."""
    return _pairs(m, i, fma if op == "fma" else _TWO[op], i.operands[1:])


def _pairs(m: Machine, i: Instruction, function: Callable[..., Array], operands: Sequence[str]) -> Step:
    registers, target = m.registers, m.target(i.operands[0])
    sources = [m.source(text, "b64") for text in operands]

    def run() -> None:
        registers[target] = function(*(registers[place].view(F32) for place in sources)).view(U64)

    return run, [target]


def fused_step(m: Machine, i: Instruction, sign: int, a: str, b: str, other_sign: int, c: str) -> Step:
    """A sum whose addend is a product, as ptxas fuses the two."""
    if i.name.endswith("x2"):
        return _pairs(m, i, fma, [a, b, c])
    return m.lanewise(i, ["f32"] * 3, lambda x, y, z: fma(x * F32(sign), y, z * F32(other_sign)), [a, b, c])


def _zeros_apart(function: Callable[..., Array], larger: bool) -> Callable[..., Array]:
    """-0 counts as smaller than 0."""

    def run(a: Array, b: Array) -> Array:
        result, bits = function(a, b), U32 if a.dtype == F32 else U64
        both = a.view(bits) & b.view(bits) if larger else a.view(bits) | b.view(bits)
        return np.where((a == 0) & (b == 0), both.view(a.dtype), result)

    return run


@instruction(r"(?P<op>min|max)(?P<ftz>\.ftz)?(?P<nan>\.NaN)?\.(?P<kind>f32|f64)")
def extreme_floats(m: Machine, i: Instruction, op: str, ftz: str | None, nan: str | None, kind: str) -> Step:
    ignoring, propagating = (np.fmin, np.minimum) if op == "min" else (np.fmax, np.maximum)
    two = _flushing(_zeros_apart(propagating if nan else ignoring, op == "max"), ftz)
    if len(i.operands) == 4:  # of three, from sm_100 on
        return m.lanewise(i, [kind] * 3, lambda a, b, c: two(two(a, b), c))
    return m.lanewise(i, [kind] * 2, two)


@instruction(r"(?P<op>neg|abs)(?P<ftz>\.ftz)?\.(?P<kind>bf16x2|f16x2|bf16|f16|f32|f64)")
def change_sign_of_floats(m: Machine, i: Instruction, op: str, ftz: str | None, kind: str) -> Step:
    size = {"bf16x2": 32, "f16x2": 32, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}[kind]
    bits = TYPES[f"b{size}"]
    signs = bits(0x80008000 if kind.endswith("x2") else 1 << size - 1)
    if ftz and kind not in ("f32", "f16", "f16x2"):
        raise UnknownInstructionError(i)

    def change(a: Array) -> Array:
        result = a ^ signs if op == "neg" else a & ~signs
        if not ftz:
            return result
        return flush(result.view(F32)).view(U32) if kind == "f32" else flush_half(result.view(U16), "f16").view(bits)

    return m.lanewise(i, [f"b{size}"], change)


# Approximate functions: their errors, in units of the last place of the result, as the PTX ISA documents them.
_FUNCTIONS: dict[str, tuple[Callable[..., Array], float]] = {
    "ex2.approx": (np.exp2, 2.0),
    "lg2.approx": (np.log2, 2.0),
    "rsqrt.approx": (lambda a: 1 / np.sqrt(a), 2.0),
    "sqrt.approx": (np.sqrt, 1.0),
    "sqrt.rn": (np.sqrt, 0.0),
    "rcp.approx": (lambda a: 1 / a, 1.0),
    "rcp.rn": (lambda a: 1 / a, 0.0),
    "tanh.approx": (np.tanh, 2.0**12),  # 2^-11 of the result
    "sin.approx": (np.sin, 8.0),
    "cos.approx": (np.cos, 8.0),
}


@instruction(r"(?P<name>(?:ex2|lg2|rsqrt|rcp|sqrt|tanh|sin|cos)\.(?:approx|rn))(?P<ftz>\.ftz)?\.f32")
def functions(m: Machine, i: Instruction, name: str, ftz: str | None) -> Step:
    function, ulps = _FUNCTIONS[name]
    prepare: Callable[[Array], Array] = flush if ftz else lambda a: a
    off = _beside_rounding(ulps)
    return m.lanewise(i, ["f32"], lambda a: m.rounded(function(prepare(a).astype(F64)), off, ftz=bool(ftz)))


def _beside_rounding(ulps: float) -> float:
    """The rounding takes half a unit of an approximation's error."""
    return max(ulps - 0.5, 0.0)


@instruction(r"div\.(?P<form>approx|full|rn)(?P<ftz>\.ftz)?\.f32")
def divide(m: Machine, i: Instruction, form: str, ftz: str | None) -> Step:
    """The approximate one is a product with a reciprocal, which is 0 for divisors beyond 2^126."""
    ulps = 0.0 if form == "rn" else _beside_rounding(2.0)
    prepare: Callable[[Array], Array] = flush if ftz else lambda a: a

    def function(a: Array, b: Array) -> Array:
        dividend, divisor = prepare(a).astype(F64), prepare(b).astype(F64)
        if form == "approx":
            divisor = np.where(np.abs(divisor) > 2.0**126, np.copysign(np.inf, divisor), divisor)
        return m.rounded(dividend / divisor, ulps, ftz=bool(ftz))

    return m.lanewise(i, ["f32"] * 2, function)


# --- half precision ---------------------------------------------------------------------------------------------------


def _half(m: Machine, i: Instruction, kind: str, function: Callable[..., Array], count: int) -> Step:
    """`function` of float32 values, which gives bits of the half format."""
    size, kind = ("b32", kind[:-2]) if kind.endswith("x2") else ("b16", kind)
    widen = from_bf16 if kind == "bf16" else lambda a: a.view(F16).astype(F32)
    bits: Any = U32 if size == "b32" else U16

    def run(*words: Array) -> Array:
        return function(*(widen(np.ascontiguousarray(word).view(U16)) for word in words)).view(bits)

    return m.lanewise(i, [size] * count, run)


@instruction(r"(?P<op>add|sub|mul|min|max)(?:\.rn)?(?P<nan>\.NaN)?\.(?P<kind>bf16x2|f16x2|bf16|f16)")
def arithmetic_of_halves(m: Machine, i: Instruction, op: str, nan: str | None, kind: str) -> Step:
    extremes = {"min": np.minimum, "max": np.maximum} if nan else {"min": np.fmin, "max": np.fmax}
    function = _TWO.get(op) or _zeros_apart(extremes[op], op == "max")
    base = kind.removesuffix("x2")
    return _half(m, i, kind, lambda a, b: narrow(function(a.astype(F64), b.astype(F64)), base), 2)


@instruction(r"fma\.rn\.(?P<kind>bf16x2|f16x2|bf16|f16)")
def fma_of_halves(m: Machine, i: Instruction, kind: str) -> Step:
    return _half(m, i, kind, lambda a, b, c: fma_half(a, b, c, kind.removesuffix("x2")), 3)


@instruction(r"(?P<op>ex2|tanh)\.approx(?P<ftz>\.ftz)?\.(?P<kind>bf16x2|f16x2|bf16|f16)")
def functions_of_halves(m: Machine, i: Instruction, op: str, ftz: str | None, kind: str) -> Step:
    function, base = np.exp2 if op == "ex2" else np.tanh, kind.removesuffix("x2")

    def rounded(a: Array) -> Array:
        result = narrow(function(a.astype(F64)), base)
        return flush_half(result, base) if ftz else result

    return _half(m, i, kind, rounded, 1)


# --- comparisons ------------------------------------------------------------------------------------------------------

_COMPARISONS: dict[str, Callable[..., Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_COMBINATIONS: dict[str, Callable[..., Array]] = {
    "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor,
}  # fmt: skip


def _comparison(name: str, floating: bool) -> Callable[[Array, Array], Array]:
    if not floating:
        return _COMPARISONS[name]
    if name in ("nan", "num"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    compare = _COMPARISONS[name.removesuffix("u")]
    if name.endswith("u"):  # true for NaN
        return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)
    return lambda a, b: compare(a, b) & ~(np.isnan(a) | np.isnan(b))


@instruction(
    r"setp\.(?P<name>eq|ne|lt|le|gt|ge|lo|ls|hi|hs|equ|neu|ltu|leu|gtu|geu|num|nan)"
    r"(?:\.(?P<combine>and|or|xor))?(?P<ftz>\.ftz)?\.(?P<kind>[sub](?:16|32|64)|f32|f64)"
)
def compare(m: Machine, i: Instruction, name: str, combine: str | None, ftz: str | None, kind: str) -> Step:
    function = _comparison(name, kind[0] == "f")
    if ftz:
        plain = function
        function = lambda a, b: plain(flush(a), flush(b))  # noqa: E731
    if "|" in i.operands[0]:
        raise UnknownInstructionError(i, "two results")
    if combine:
        both = _COMBINATIONS[combine]
        return m.lanewise(i, [kind, kind, "pred"], lambda a, b, c: both(function(a, b), c))
    return m.lanewise(i, [kind] * 2, function)
