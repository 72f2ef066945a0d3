"""Logic, shifts, bit fields, permutations and selections."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .numbers import I64, TYPES, U8, U32, U64, Array
from .registry import Step, instruction

if TYPE_CHECKING:
    from .machine import Machine
    from .program import Instruction

_LOGIC: dict[str, Callable[..., Array]] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@instruction(r"(?P<op>and|or|xor)\.(?P<kind>pred|b16|b32|b64)")
def logic(m: Machine, i: Instruction, op: str, kind: str) -> Step:
    return m.lanewise(i, [kind] * 2, _LOGIC[op])


@instruction(r"not\.(?P<kind>pred|b16|b32|b64)")
def invert(m: Machine, i: Instruction, kind: str) -> Step:
    return m.lanewise(i, [kind], np.invert)


@instruction(r"(?P<op>shl|shr)\.(?P<kind>[sub](?:16|32|64))")
def shift(m: Machine, i: Instruction, op: str, kind: str) -> Step:
    """Amounts beyond the width shift everything out, in NumPy as in PTX."""
    function, own = (np.left_shift if op == "shl" else np.right_shift), TYPES[kind]
    most = 8 * np.dtype(own).itemsize
    return m.lanewise(i, [kind, "u32"], lambda a, b: function(a, np.minimum(b, most).astype(own)))


@instruction(r"shf\.(?P<direction>l|r)\.(?P<mode>wrap|clamp)\.b32")
def funnel_shift(m: Machine, i: Instruction, direction: str, mode: str) -> Step:
    def function(a: Array, b: Array, c: Array) -> Array:
        both = a.astype(U64) | b.astype(U64) << U64(32)
        n = (np.minimum(c, 32) if mode == "clamp" else c & U32(31)).astype(U64)
        return ((both << n) >> U64(32) if direction == "l" else both >> n).astype(U32)

    return m.lanewise(i, ["b32"] * 3, function)


@instruction(r"bfe\.(?P<kind>[su]32)")
def extract_field(m: Machine, i: Instruction, kind: str) -> Step:
    """`length` bits of a from bit `start` on; beyond the width, zeros or copies of the sign."""

    def function(a: Array, start: Array, length: Array) -> Array:
        first, count = (start & U32(255)).astype(I64), np.minimum(length & U32(255), 32).astype(I64)
        value, ones = a.astype(I64), (I64(1) << count) - 1
        field = value >> np.minimum(first, 63) & ones
        if kind == "s32":
            last = np.clip(first + count - 1, 0, 31)
            field = np.where((value >> last & 1 == 1) & (count > 0), field | ~ones, field)
        return field.astype(U32)

    return m.lanewise(i, [kind, "u32", "u32"], function)


@instruction(r"bfi\.b32")
def insert_field(m: Machine, i: Instruction) -> Step:
    def function(a: Array, b: Array, start: Array, length: Array) -> Array:
        start, length = np.minimum(start & U32(255), 32).astype(U64), np.minimum(length & U32(255), 32).astype(U64)
        field = (((U64(1) << length) - U64(1)) << start) & U64(0xFFFFFFFF)
        return ((b.astype(U64) & ~field) | ((a.astype(U64) << start) & field)).astype(U32)

    return m.lanewise(i, ["b32"] * 4, function)


@instruction(r"prmt\.b32")
def permute_bytes(m: Machine, i: Instruction) -> Step:
    def function(a: Array, b: Array, selector: Array) -> Array:
        both = a.astype(U64) | b.astype(U64) << U64(32)
        result = np.zeros_like(a)
        for place in range(4):
            pick = selector >> U32(4 * place) & U32(15)
            byte = (both >> (U64(8) * (pick & U32(7)).astype(U64)) & U64(255)).astype(U32)
            sign = np.where(byte & U32(128), U32(255), U32(0))
            result |= np.where(pick & U32(8), sign, byte) << U32(8 * place)
        return result

    return m.lanewise(i, ["b32"] * 3, function)


@instruction(r"lop3\.b32")
def logic_of_three(m: Machine, i: Instruction) -> Step:
    table = int(i.operands[4], 0)

    def function(a: Array, b: Array, c: Array) -> Array:
        result = np.zeros_like(a)
        for case in range(8):
            if table >> case & 1:
                result |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
        return result

    return m.lanewise(i, ["b32"] * 3, function, i.operands[1:4])


@instruction(r"popc\.(?P<kind>b32|b64)")
def count_ones(m: Machine, i: Instruction, kind: str) -> Step:
    return m.lanewise(i, [kind], lambda a: np.bitwise_count(a).astype(U32))


@instruction(r"clz\.(?P<kind>b32|b64)")
def count_leading_zeros(m: Machine, i: Instruction, kind: str) -> Step:
    bits = int(kind[1:])

    def function(a: Array) -> Array:
        found = np.full(a.shape, bits, U32)
        for bit in range(bits):
            found = np.where(a >> a.dtype.type(bit) & a.dtype.type(1) == 1, U32(bits - 1 - bit), found)
        return found

    return m.lanewise(i, [kind], function)


@instruction(r"selp\.(?P<kind>[subf](?:16|32|64))")
def select(m: Machine, i: Instruction, kind: str) -> Step:
    bits = f"b{kind[1:]}"

    def function(a: Array, b: Array, on: Array) -> Array:
        return np.where(on, a, b)

    return m.lanewise(i, [bits, bits, "pred"], function)


@instruction(r"copysign\.f32")
def copy_sign(m: Machine, i: Instruction) -> Step:
    """The sign of the first, the size of the second."""
    return m.lanewise(i, ["b32"] * 2, lambda a, b: (b & U32(0x7FFFFFFF)) | (a & U32(0x80000000)))


@instruction(r"dp4a\.(?P<a>[su]32)\.(?P<b>[su]32)")
def dot_of_bytes(m: Machine, i: Instruction, a: str, b: str) -> Step:
    def bytes_of(words: Array, kind: str) -> Array:
        return np.ascontiguousarray(words).view(np.int8 if kind == "s32" else U8).reshape(-1, 4).astype(I64)

    def function(x: Array, y: Array, c: Array) -> Array:
        return ((bytes_of(x, a) * bytes_of(y, b)).sum(1) + c.astype(I64)).astype(U32)

    return m.lanewise(i, [a, b, "s32"], function)
