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

    Past the end the last row repeats, so that loads need no mask.
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
    """x + layer_scale * (avg_pool3x3(x) - x) for the pixels at `ptrs` [M, C], in float32.

    h, w [M] are their lines and columns. The mean is taken over columns, then over lines. Outside of the map the middle
    one repeats, so that loads need no mask, and its weight makes up for it: 1/3 1/3 1/3 within, 1/2 0 1/2 at an edge.
    """
    up = ptrs + tl.where(h > 0, -stride_h, 0)[:, None]
    down = ptrs + tl.where(h < H - 1, stride_h, 0)[:, None]
    left, right = tl.where(w > 0, -stride_w, 0)[:, None], tl.where(w < W - 1, stride_w, 0)[:, None]
    x = _load_float(ptrs, mask)
    beside = _load_float(ptrs + left, mask) + _load_float(ptrs + right, mask)
    upright = _load_float(up, mask) + _load_float(down, mask)
    corners = _load_float(up + left, mask) + _load_float(up + right, mask)
    corners += _load_float(down + left, mask) + _load_float(down + right, mask)
    outer_h, outer_w = _outer_weight(h, H)[:, None], _outer_weight(w, W)[:, None]
    middle_h, middle_w = 1 - 2 * outer_h, 1 - 2 * outer_w
    change = (middle_h * middle_w - 1) * x + middle_h * outer_w * beside
    change += outer_h * middle_w * upright + outer_h * outer_w * corners
    return (x + layer_scale * change).to(ptrs.dtype.element_ty)


@triton.jit
def _load_float(ptrs, mask):
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _outer_weight(i, SIZE):
    """One over the number of lines, or columns, that a window around i covers."""
    before, after = i > 0, i < SIZE - 1
    return tl.where(before & after, 1 / 3, tl.where(before | after, 0.5, 1.0))
