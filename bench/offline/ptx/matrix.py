"""Sums of products as matrix units make them, and matrix operands in shared memory (descriptors, swizzles)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .numbers import F32, F64, I64, U32, U64, Array, from_bf16, to_tf32, truncated
from .registry import UnknownInstructionError
from .shared_memory import CHUNK, SHARED_BASE

if TYPE_CHECKING:
    from .machine import Machine
    from .program import Instruction

# How far a sum is cut off: the products that are added at once, and the bits kept beyond float32's 24, by compute
# capability and bytes of an operand (arXiv 2512.07004).
_UNITS = {80: ({2: 8, 4: 4}, 1), 90: ({2: 16, 4: 8}, 2)}
_LEAST = {"f16": -14}  # exponents of normal numbers; of the other types as of float32
BYTES = {"bf16": 2, "f16": 2, "tf32": 4}


def multiply_add(m: Machine, a: Array, b: Array, c: Array, kind: str) -> Array:
    """a [..., M, K] · b [..., K, N] + c [..., M, N] of float32, in float32.

    Exact products, summed in float64 and rounded once; with `Options.truncate` cut off as GPUs do: a unit aligns
    products, whose significands are below 4, to the largest exponent.
    """
    if not m.options.truncate:
        return (np.matmul(a.astype(F64), b.astype(F64)) + c).astype(F32)
    depths, extra = _UNITS[90 if m.program.capability in range(90, 120) else 80]
    depth, result, least = depths[BYTES[kind]], c, _LEAST.get(kind, -126)
    of_a, of_b = _exponents(a, least), _exponents(b, least)
    for first in range(0, a.shape[-1], depth):
        part = slice(first, first + depth)
        products = a[..., part, None].astype(F64) * b[..., None, part, :].astype(F64)
        addends = np.concatenate([products, result[..., :, None, :].astype(F64)], -2)
        exponents = of_a[..., part, None] + of_b[..., None, part, :]
        exponents = np.concatenate([exponents, _exponents(result, -126)[..., :, None, :]], -2)
        largest = np.where(addends != 0, exponents, -1000).max(-2)
        unit = np.exp2((largest - 23 - extra).astype(F64))
        cut = np.trunc(addends / unit[..., None, :]).sum(-2) * unit
        cut = np.where(np.abs(cut) < 2.0**128, truncated(cut), np.copysign(np.inf, cut))
        result = np.where(np.isfinite(addends).all(-2), cut, addends.sum(-2)).astype(F32)
    return result


def _exponents(x: Array, least: int) -> Array:
    """Of the leading bit, or of subnormal numbers the least."""
    return np.maximum(np.frexp(x)[1] - 1, least)


def operand_chunks(
    m: Machine, i: Instruction, words: Array, span: int, programs: Array, rows: int, depth: int, kind: str, *,
    depth_first: bool,
) -> Array:  # fmt: skip
    """The 16-byte chunks (numbers in the memory of all programs) of the operands that descriptors name.

    Args:
        m: the machine.
        i: the instruction.
        words: 64-bit descriptors [G].
        span: bytes of a swizzled row: 128, 64, 32, or 16 without a swizzle.
        programs: [G], whose memory it is.
        rows: of the operand, along M or N.
        depth: along K.
        kind: of an element.
        depth_first: whether a chunk lies along K ("K-major") or along the rows.

    Returns:
        [G, rows, chunks] or, where a chunk lies along the rows, [G, depth, chunks].
    """

    def bits(low: int, count: int) -> Array:
        return (words >> U64(low) & U64((1 << count) - 1)).astype(I64)[:, None, None]

    start, leading, stride = bits(0, 14) << 4, bits(16, 14) << 4, bits(32, 14) << 4
    if bits(49, 3).any():
        raise UnknownInstructionError(i, "a matrix descriptor with a base offset")
    each = CHUNK // BYTES[kind]
    if depth_first:
        row, chunk = np.arange(rows)[None, :, None], np.arange(depth // each)[None, None, :]
        address = start + row // 8 * stride + row % 8 * span + chunk * (leading if span == CHUNK else CHUNK)
    else:
        row, chunk = np.arange(depth)[None, :, None], np.arange(rows // each)[None, None, :]
        if span == CHUNK:
            address = start + chunk * stride + row // 8 * leading + row % 8 * CHUNK
        else:
            wide = span // CHUNK
            address = start + chunk // wide * leading + chunk % wide * CHUNK + row // 8 * stride + row % 8 * span
    address = address ^ ((address >> 7 & span // CHUNK - 1) << 4)
    at = address - SHARED_BASE
    bad = (at < 0) | (at + CHUNK > m.shared.size)
    if bad.any():
        m.faults.add("a matrix operand outside shared memory", i, f"offset {at[bad][0]} of {m.shared.size}",
                     int(bad.sum()))  # fmt: skip
        at = np.where(bad, 0, at)
    return (at + programs[:, None, None] * m.shared.size) // CHUNK


def operand_values(m: Machine, chunks: Array, kind: str, *, depth_first: bool) -> Array:
    """float32 [G, rows, depth] of the chunks that `operand_chunks` gave."""
    raw = m.shared.chunks[chunks]  # of 16 bits
    if kind == "tf32":
        values = to_tf32(np.ascontiguousarray(raw).view(U32), nearest=False).view(F32)
    else:
        values = from_bf16(raw) if kind == "bf16" else raw.view(np.float16).astype(F32)
    values = values.reshape(*chunks.shape[:2], -1)
    return values if depth_first else values.swapaxes(1, 2)
