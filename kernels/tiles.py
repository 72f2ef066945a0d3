"""What the kernels share: channel counts as sums of powers of two, addresses of rows, average pooling.

A Triton tile has powers of two as sides. A kernel that keeps all channels of a row on chip holds a tuple of tiles
instead of one padded tile: 48 = 32 + 16, 224 = 128 + 64 + 32.
"""

from __future__ import annotations

import triton
import triton.language as tl

SMALLEST = 16  # side of a matrix product's operand


def split(size: int, pieces: int = 3) -> tuple[int, ...]:
    """Powers of two, falling, of 16 and more, at most `pieces` of them, with a sum of `size` or barely more."""
    widths: list[int] = []
    while size > 0:
        fits = SMALLEST
        while fits * 2 <= size:
            fits *= 2
        last = len(widths) + 1 == pieces
        if last and fits < size:
            fits *= 2
        widths.append(fits)
        size -= fits
    while len(widths) > 1 and widths[-1] == widths[-2]:  # 17 to 31 are not 16 + 16, but 32
        widths[-2:] = [2 * widths[-1]]
    return tuple(widths)


@triton.constexpr_function
def width(widths, piece):
    """Channels in this piece."""
    return widths[piece]


@triton.constexpr_function
def start(widths, piece):
    """First channel of this piece."""
    return sum(widths[:piece])


@triton.constexpr_function
def cut(widths, piece, size):
    """Whether this piece reaches beyond `size`, so that its loads and stores need a mask."""
    return sum(widths[: piece + 1]) > size


@triton.jit
def channels_of(WIDTHS: tl.constexpr, PIECE: tl.constexpr):
    return start(WIDTHS, PIECE) + tl.arange(0, width(WIDTHS, PIECE))


@triton.jit
def tile_mask(inside, c, SIZE: tl.constexpr, WIDTHS: tl.constexpr, PIECE: tl.constexpr):
    """[M, width or 1] for a tile of rows (inside [M]) by the channels c of one piece."""
    if cut(WIDTHS, PIECE, SIZE):
        mask = inside[:, None] & (c < SIZE)[None, :]
    else:
        mask = inside[:, None]
    return mask


@triton.jit
def load_vector(ptr, c, SIZE: tl.constexpr, WIDTHS: tl.constexpr, PIECE: tl.constexpr):
    """[1, width] in float32, zeros beyond SIZE."""
    if cut(WIDTHS, PIECE, SIZE):
        value = tl.load(ptr + c, mask=c < SIZE, other=0.0)
    else:
        value = tl.load(ptr + c)
    return value.to(tl.float32)[None, :]


@triton.jit
def locate(i_tile, rows, H, W, BLOCK_M: tl.constexpr):
    """Image (64 bits), line, column of each row of a tile, and whether it exists; each [BLOCK_M].

    The tile's first row may lie beyond 2**31; from there on, 32 bits do.
    """
    first = i_tile.to(tl.int64) * BLOCK_M
    r = tl.arange(0, BLOCK_M)
    inside = r < tl.minimum(rows - first, BLOCK_M).to(tl.int32)
    pixels = H * W
    p = (first % pixels).to(tl.int32) + r
    b = first // pixels + p // pixels
    p = p % pixels
    return b, p // W, p % W, inside


@triton.jit
def row_offsets(i_tile, b, h, w, stride_b, stride_h, stride_w, FLAT: tl.constexpr, BLOCK_M: tl.constexpr):
    """Offset of each row of a tile in elements, 64 bits, [BLOCK_M]; b, h, w come from `locate`."""
    if FLAT:
        offsets = (i_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)) * stride_w
    else:
        offsets = b * stride_b + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w
    return offsets


@triton.jit
def pool_tile(ptrs, mask, h, w, H, W, stride_h, stride_w, layer_scale):
    """x + layer_scale * (avg_pool3x3(x) - x) for the pixels at `ptrs` [M, C], in float32.

    h, w [M] are their lines and columns; what lies outside of the map counts neither into the sum nor into the number.
    """
    dtype = ptrs.dtype.element_ty
    x = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    total = x
    for dy in tl.static_range(-1, 2):
        for dx in tl.static_range(-1, 2):
            if dy != 0 or dx != 0:
                there = (h + dy >= 0) & (h + dy < H) & (w + dx >= 0) & (w + dx < W)
                offset = dy * tl.cast(stride_h, tl.int64) + dx * tl.cast(stride_w, tl.int64)
                neighbour = tl.load(ptrs + offset, mask=mask & there[:, None], other=0.0)
                total += neighbour.to(tl.float32)
    lines = 3 - (h == 0).to(tl.int32) - (h == H - 1).to(tl.int32)
    columns = 3 - (w == 0).to(tl.int32) - (w == W - 1).to(tl.int32)
    mean = total * (1.0 / (lines * columns).to(tl.float32))[:, None]
    return (x + layer_scale * (mean - x)).to(dtype)
