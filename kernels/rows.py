"""Shared by the kernels: channel counts as sums of powers of two, addresses of rows, average pooling.

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
def channel_mask(c, SIZE: tl.constexpr, WIDTHS: tl.constexpr, PIECE: tl.constexpr):
    """[1, width]: which of the channels c of one piece exist; a constant, and free, where all do."""
    if cut(WIDTHS, PIECE, SIZE):
        mask = (c < SIZE)[None, :]
    else:
        mask = tl.full((1, width(WIDTHS, PIECE)), True, tl.int1)
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
    """Number, image (in the type of `rows`), line, column of each row of a tile, and whether it exists; each [BLOCK_M].

    Past the end the last row repeats, so that loads need no mask. Stores do: one may read again what another wrote.
    """
    first = tl.minimum(i_tile, rows) * BLOCK_M  # i_tile, but in 64 bits where there are 2**31 rows
    r = tl.arange(0, BLOCK_M)
    last = tl.minimum(rows - first, BLOCK_M).to(tl.int32) - 1
    inside = r <= last
    r = tl.minimum(r, last)
    pixels = H * W
    p = (first % pixels).to(tl.int32) + r
    b = first // pixels + p // pixels
    p = p % pixels
    return first + r, b, p // W, p % W, inside


@triton.jit
def row_offsets(row, b, h, w, stride_b, stride_h, stride_w, FLAT: tl.constexpr):
    """Offset of each row of a tile in elements, 64 bits, [BLOCK_M]; row, b, h, w come from `locate`."""
    if FLAT:
        offsets = row.to(tl.int64) * stride_w
    else:
        offsets = b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w
    return offsets


@triton.jit
def pool_tile(ptrs, mask, h, w, H, W, stride_h, stride_w, layer_scale):
    """x + layer_scale * (avg_pool3x3(x) - x) for the pixels at `ptrs` [M, C], h and w [M] their lines and columns.

    Where the map ends, the middle line or column is read again, so that loads need no mask; both readings share its
    weight. None is 0: the neighbour of an infinity is infinite, not NaN. In float32; the result has the pixels' dtype.
    """
    w_up, w_middle, w_down = _weights(h, H)
    up = ptrs + tl.where(h > 0, -stride_h, 0)[:, None]
    down = ptrs + tl.where(h < H - 1, stride_h, 0)[:, None]
    x = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    mean = w_middle[:, None] * _mean_of_line(ptrs, mask, w, W, stride_w)
    mean += w_up[:, None] * _mean_of_line(up, mask, w, W, stride_w)
    mean += w_down[:, None] * _mean_of_line(down, mask, w, W, stride_w)
    return (x + layer_scale * (mean - x)).to(ptrs.dtype.element_ty)


@triton.jit
def _mean_of_line(ptrs, mask, w, W, stride_w):
    """Mean of the pixels at `ptrs` and their neighbours to both sides."""
    w_left, w_middle, w_right = _weights(w, W)
    left = tl.where(w > 0, -stride_w, 0)[:, None]
    right = tl.where(w < W - 1, stride_w, 0)[:, None]
    mean = w_middle[:, None] * tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    mean += w_left[:, None] * tl.load(ptrs + left, mask=mask, other=0.0).to(tl.float32)
    return mean + w_right[:, None] * tl.load(ptrs + right, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _weights(i, SIZE):
    """Of the line (or column) before, the middle one and the one after: those that exist count alike, 1 together."""
    before, after = i > 0, i < SIZE - 1
    both = before == after  # a map of one line is read three times
    w_before = tl.where(both, 1 / 3, tl.where(before, 0.5, 0.25))
    w_after = tl.where(both, 1 / 3, tl.where(after, 0.5, 0.25))
    return w_before, tl.where(both, 1 / 3, 0.25), w_after
