"""Number formats of PTX as NumPy arrays, and conversions that round once."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
I8, I16, I32, I64 = np.int8, np.int16, np.int32, np.int64
F16, F32, F64 = np.float16, np.float32, np.float64

# Types of PTX that NumPy has. bf16 and tf32 are kept as bits.
TYPES: dict[str, Any] = {
    "b8": U8, "u8": U8, "s8": I8, "b16": U16, "u16": U16, "s16": I16, "b32": U32, "u32": U32, "s32": I32,
    "b64": U64, "u64": U64, "s64": I64, "f16": F16, "f32": F32, "f64": F64, "pred": np.bool_,
}  # fmt: skip
UNSIGNED: dict[int, Any] = {1: U8, 2: U16, 4: U32, 8: U64}

_LEAST = F32(2.0**-126)  # of the normal numbers
_INFINITY = U32(0x7F800000)
_TF32 = U32(0xFFFFE000)


def width(kind: str) -> int:
    """Bytes of a type of PTX."""
    return TYPES[kind]().itemsize


def flush(x: Array) -> Array:
    """Subnormal float32 become zeros of their sign, as `.ftz` says."""
    return np.where(np.abs(x) < _LEAST, np.copysign(F32(0), x), x)


def flush_half(bits: Array, kind: str) -> Array:
    """The same for bits of f16 or bf16."""
    exponent = U16(0x7C00 if kind == "f16" else 0x7F80)
    return np.where(bits & exponent == 0, bits & U16(0x8000), bits)


def from_bf16(bits: Array) -> Array:
    return (bits.view(U16).astype(U32) << U32(16)).view(F32)


def to_bf16(x: Array) -> Array:
    """float32 to the bits of bfloat16, to the nearest, ties to even; NaN becomes the canonical one."""
    bits = x.view(U32)
    rounded = ((bits + U32(0x7FFF) + (bits >> U32(16) & U32(1))) >> U32(16)).astype(U16)
    return np.where(np.isnan(x), U16(0x7FFF), rounded)


def to_f16(x: Array) -> Array:
    """float32 or float64 to the bits of float16; NaN becomes the canonical one."""
    return np.where(np.isnan(x), U16(0x7FFF), x.astype(F16).view(U16))


def to_tf32(bits: Array, *, nearest: bool) -> Array:
    """Bits of float32 to those of TF32: to the nearest, ties away from zero, or cut off as tensor cores do."""
    if nearest:
        finite = (bits & _INFINITY) != _INFINITY
        bits = np.where(finite, bits + U32(0x1000), bits)
    return bits & _TF32


def pairs(words: Array, kind: str) -> Array:
    """[...] of 32 bits as float32 [..., 2] (tf32: [..., 1]), the lower half first."""
    if kind == "tf32":
        return to_tf32(words, nearest=False).view(F32)[..., None]
    halves = np.ascontiguousarray(words).view(U16).reshape(*words.shape, 2)
    return from_bf16(halves) if kind == "bf16" else halves.view(F16).astype(F32)


def _odd_sum(a: Array, b: Array) -> Array:
    """a + b in float64, rounded to odd: a second rounding, to 51 bits or fewer, then is as if it were the only one."""
    total = a + b
    other = total - a
    error = (a - (total - other)) + (b - other)
    bits = total.view(I64)
    inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    away = (error > 0) == (total > 0)
    return np.where(inexact, np.where(away, bits + 1, bits - 1), bits).view(F64)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32, rounded once."""
    product = a.astype(F64) * b
    total = product + c
    # Rounding twice differs where the first result lies halfway between two float32, or is subnormal.
    doubtful = (total.view(U64) & U64(0x1FFFFFFF) == U64(0x10000000)) | (np.abs(total) < F64(_LEAST))
    if doubtful.any():
        total = np.where(doubtful, _odd_sum(product, c.astype(F64)), total)
    return total.astype(F32)


def fma_half(a: Array, b: Array, c: Array, kind: str) -> Array:
    """a * b + c of float32 that hold f16 or bf16, rounded once to bits of these."""
    return narrow(_odd_sum(a.astype(F64) * b, c.astype(F64)), kind)


def narrow(x: Array, kind: str) -> Array:
    """float64 to the bits of f16 or bf16."""
    if kind == "f16":
        return to_f16(x)
    near = x.astype(F32)  # then to odd: the last rounding is the only one
    bits, back = near.view(I32), near.astype(F64)
    inexact = np.isfinite(near) & (back != x) & (bits & 1 == 0)
    return to_bf16(
        np.where(inexact, np.where(np.abs(back) < np.abs(x), bits + 1, bits - 1), bits).astype(I32).view(F32)
    )


def truncated(x: Array) -> Array:
    """float64 to float32, towards zero."""
    near = x.astype(F32)
    return np.where(np.abs(near.astype(F64)) > np.abs(x), np.nextafter(near, F32(0)), near)


def quotient(a: Array, b: Array) -> Array:
    """Integer division towards zero; by zero it is -1, as on hardware (PTX leaves it open)."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return np.where(b == 0, ~a.dtype.type(0), a // safe)
    size = np.abs(a).view(f"u{a.itemsize}") // np.abs(safe).view(f"u{a.itemsize}")  # the least number has no opposite
    size = size.view(a.dtype)
    return np.where(b == 0, -1, np.where((a < 0) != (b < 0), -size, size)).astype(a.dtype)


def high_product(a: Array, b: Array) -> Array:
    """The upper half of a product of integers."""
    bits, kind = 8 * a.itemsize, a.dtype
    if bits < 64:
        big = I64 if kind.kind == "i" else U64
        return (a.astype(big) * b.astype(big) >> big(bits)).astype(kind)
    found = [int(x) * int(y) >> 64 & (1 << 64) - 1 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    return np.array(found, U64).view(kind)
