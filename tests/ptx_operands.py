"""Operands of matrix units as the PTX ISA lays them out: fragments of threads, and tiles in shared memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ptx_memory_runs import Array, names

SIZE = {"bf16": 2, "f16": 2, "tf32": 4}
LANE = np.arange(32)
GROUP, INDEX = LANE // 4, LANE % 4  # "groupID", "threadID_in_group"


def encoded(values: Array, kind: str) -> Array:
    """Whole numbers as the bits of a type."""
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.astype(np.float32).view(np.uint32)
    return bits if kind == "tf32" else (bits >> 16).astype(np.uint16)


def a_places(kind: str, depth: int) -> tuple[Array, Array]:
    """Row and column [lanes, elements] of a fragment of A, 16 rows."""
    element = np.arange(16 * depth // 32)[None, :]
    g, t = GROUP[:, None], INDEX[:, None]
    if kind == "tf32":  # a0: (g, t), a1: (g + 8, t), a2: (g, t + 4), a3: (g + 8, t + 4)
        return g + 8 * (element % 2), t + 4 * (element // 2)
    upper = (element // 2) % 2  # a0, a1, a4, a5 lie in row g, the others in row g + 8
    return g + 8 * upper, 2 * t + element % 2 + 8 * (element // 4)


def b_places(kind: str, depth: int) -> tuple[Array, Array]:
    """Row and column of a fragment of B, 8 columns."""
    element = np.arange(8 * depth // 32)[None, :]
    g, t = GROUP[:, None], INDEX[:, None]
    row = t + 4 * element if kind == "tf32" else 2 * t + element % 2 + 8 * (element // 2)
    return row, g + 0 * element


def c_places(columns: int) -> tuple[Array, Array]:
    """Row and column of a fragment of the sums, 16 rows."""
    element = np.arange(columns // 2)[None, :]
    g, t = GROUP[:, None], INDEX[:, None]
    return g + 8 * (element // 2 % 2), 8 * (element // 4) + 2 * t + element % 2


@dataclass
class Tile:
    """A matrix in shared memory.

    Attributes:
        image: the bytes; those that do not belong to it would be NaN.
        descriptor: without the start address and the swizzle.
        step: bytes from one instruction's part along K to the next.
    """

    image: Array
    descriptor: int
    step: int


def tile(matrix: Array, kind: str, span: int, *, depth_first: bool) -> Tile:
    """[rows, depth] with a swizzle of `span` bytes (16: none), contiguous along the depth or along the rows."""
    size = SIZE[kind]
    rows, depth = matrix.shape
    row, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    byte = k * size
    if depth_first and span == 16:  # blocks of 8 rows of 16 bytes
        stride, leading = 128, rows // 8 * 128 + 128
        place, step = row // 8 * stride + byte // 16 * leading + row % 8 * 16 + byte % 16, 2 * leading
    elif depth_first:  # blocks of 8 rows of `span` bytes
        assert depth * size == span
        stride, leading = 16 * span, 0
        chunk = byte // 16 ^ row % 8 * span // 128
        place, step = row // 8 * stride + row % 8 * span + chunk * 16 + byte % 16, 32
    elif span == 16:  # blocks of 8 k of 8 rows
        stride, leading = 128, rows // 8 * 128 + 128
        place, step = row // 8 * stride + k // 8 * leading + k % 8 * 16 + row % 8 * size, 2 * leading
    else:  # blocks of 8 k of `span` bytes
        wide = span // size
        stride, leading = 8 * span, (depth // 8 + 1) * 8 * span
        chunk = row % wide // 8 ^ k % 8 * span // 128
        place = row // wide * leading + k // 8 * stride + k % 8 * span + chunk * 16 + row % 8 * size
        step = 2 * stride
    bits = encoded(matrix, kind)
    image = np.full((int(place.max()) + size + 1023) // 1024 * 1024, 0xFF, np.uint8)
    image.view(bits.dtype)[place // size] = bits
    return Tile(image, leading >> 4 << 16 | stride >> 4 << 32, step)


def fill(size: int, threads: int) -> str:
    """Copies the image of shared memory of each program, the first tensor."""
    lines = [f"mov.u32 %r0, %ctaid.x; mul.wide.u32 %rd0, %r0, {size}; add.s64 %rd0, %rd0, %g0;",
             "mad.wide.u32 %rd0, %t, 16, %rd0; mad.lo.u32 %r1, %t, 16, %smem;"]  # fmt: skip
    for first in range(0, size, 16 * threads):
        if size - first < 16 * threads:
            lines.append(f"setp.lt.u32 %p9, %t, {(size - first) // 16};")
        on = "@%p9 " if size - first < 16 * threads else ""
        lines.append(f"{on}ld.global.v4.b32 {names('r', 4, 2)}, [%rd0 + {first}];")
        lines.append(f"{on}st.shared.v4.b32 [%r1 + {first}], {names('r', 4, 2)};")
    return "\n".join([*lines, "fence.proxy.async.shared::cta;", "bar.sync 0;"])


def descriptor(register: str, start: int, constant: int) -> str:
    """Of the tile at this place of shared memory."""
    return f"""
    add.u32 %r0, %smem, {start};
    bfe.u32 %r0, %r0, 4, 14;
    cvt.u64.u32 {register}, %r0;
    or.b64 {register}, {register}, 0x{constant:x};"""


def whole(seed: int, *shape: int) -> Array:
    """Whole numbers that all types have."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float64)
