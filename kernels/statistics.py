"""Statistics over all rows for BatchNorm in training: means and variances of channels, and their covariance.

A program sums over some rows. The parts are added in a fixed order, in float64, as Chan et al. do: means and squares
about them are merged, nothing large is subtracted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, dot_precision, float32_products, kernel, run
from .tiling.choose import Question, gram_config, pool_config
from .tiling.device import device_of


@kernel
def channel_statistics_kernel(
    x_ptr, out_mean_ptr, out_square_ptr, rows, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Of the rows of each tile: the mean, and the sum of squares about it, [tiles, C]. x [rows, C] in a line."""
    i_c = tl.program_id(0) % tl.cdiv(C, BLOCK_C)
    i_m = tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    first = i_m.to(tl.int64) * BLOCK_M
    inside = (first + tl.arange(0, BLOCK_M) < rows)[:, None]
    p_x = x_ptr + (first + tl.arange(0, BLOCK_M))[:, None] * C + c[None, :]
    b_x = tl.load(p_x, mask=inside & (c < C)[None, :], other=0.0).to(tl.float32)
    mean = tl.sum(b_x, 0) / tl.sum(inside.to(tl.float32), 0)
    centred = tl.where(inside, b_x - mean[None, :], 0.0)
    o_out = i_m.to(tl.int64) * C + c
    tl.store(out_mean_ptr + o_out, mean, mask=c < C)
    tl.store(out_square_ptr + o_out, tl.sum(centred * centred, 0), mask=c < C)


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (divided by the number of rows) of the channels of x [rows, C], contiguous; float64 [C]."""
    count, channels = x.shape
    question = Question("channel_sums", x.dtype, (channels, count))
    block_m, block_c, num_warps = pool_config(question, device_of(x.device))
    tiles = -(-count // block_m)
    means, squares = x.new_empty(2, tiles, channels, dtype=torch.float32)
    run(
        Launch(
            channel_statistics_kernel,
            tiles * -(-channels // block_c),
            {"x_ptr": x, "out_mean_ptr": means, "out_square_ptr": squares, "rows": count},
            {"C": channels, "BLOCK_M": block_m, "BLOCK_C": block_c},
            question,
            num_warps,
        )
    )
    return merged(_counts(tiles, block_m, count, x.device), means.double(), squares.double())


def merged(counts: Tensor, means: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [C] of all rows; of each part its rows [parts], its mean and squares about it [parts, C]."""
    counts = counts[:, None]
    mean = (means * counts).sum(0) / counts.sum()
    return mean, (squares.sum(0) + ((means - mean).square() * counts).sum(0)) / counts.sum()


def _counts(parts: int, size: int, count: int, device: torch.device) -> Tensor:
    """Rows of each part, float64."""
    return (count - size * torch.arange(parts, device=device)).clamp(0, size).double()


@triton.jit
def _pivot(b_x, inside):
    """[1, channels]: the mean of the rows where it is more than 4 deviations, in their dtype; else 0.

    Then x - pivot is exact in 16 bits: rows lie within a factor of 2 of a pivot that is not 0.
    """
    x = b_x.to(tl.float32)
    count = tl.sum(inside.to(tl.float32), 0)
    mean = tl.sum(x, 0) / count
    centred = tl.where(inside, x - mean[None, :], 0.0)
    variance = tl.sum(centred * centred, 0) / count
    return tl.where(mean * mean > 16.0 * variance, mean, 0.0).to(b_x.dtype)[None, :]


@kernel
def gram_kernel(
    x_ptr,
    out_pivot_ptr,
    out_sum_ptr,
    out_ptr,
    rows,
    share,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Of each `share` of the rows pivots and Σ (x - pivot), [splits, C], and Σ (x - pivot)(x - pivot)ᵀ, [splits, C, C].

    x [rows, C] in a line; share is a multiple of BLOCK_M. A program takes one tile of C x C.
    """
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    j = tl.program_id(0) % tiles
    i = tl.program_id(0) // tiles % tiles
    split = (tl.program_id(0) // (tiles * tiles)).to(tl.int64)
    left = i * BLOCK_C + tl.arange(0, BLOCK_C)
    right = j * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_M)
    last = tl.minimum((split + 1) * share, rows)
    row = split * share + r
    p_left = x_ptr + row[:, None] * C + left[None, :]
    p_right = x_ptr + row[:, None] * C + right[None, :]
    inside = (row < last)[:, None]
    of_left = _pivot(tl.load(p_left, mask=inside & (left < C)[None, :], other=0.0), inside)
    of_right = _pivot(tl.load(p_right, mask=inside & (right < C)[None, :], other=0.0), inside)
    gram = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for first in tl.range(0, share, BLOCK_M, num_stages=NUM_STAGES):
        inside = (row + first < last)[:, None]
        b_left = tl.load(p_left, mask=inside & (left < C)[None, :], other=0.0)
        b_right = tl.load(p_right, mask=inside & (right < C)[None, :], other=0.0)
        b_left = tl.where(inside, b_left - of_left, 0.0).to(x_ptr.dtype.element_ty)
        b_right = tl.where(inside, b_right - of_right, 0.0).to(x_ptr.dtype.element_ty)
        total += tl.sum(b_left.to(tl.float32), 0)
        gram = tl.dot(b_left.T, b_right, gram, input_precision=PRECISION)
        p_left += BLOCK_M * C
        p_right += BLOCK_M * C
    p_out = out_ptr + split * C * C + left[:, None] * C + right[None, :]
    tl.store(p_out, gram, mask=(left < C)[:, None] & (right < C)[None, :])
    if j == 0:
        o_sum = split * C + left
        tl.store(out_pivot_ptr + o_sum[None, :], of_left.to(tl.float32), mask=(left < C)[None, :])
        tl.store(out_sum_ptr + o_sum, total, mask=left < C)


def covariance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [C] and covariance [C, C] (divided by the number of rows) of x [rows, C], contiguous; float64."""
    count, channels = x.shape
    question = Question("gram", x.dtype, (channels, count))
    device = device_of(x.device)
    config = gram_config(question, device)
    share = -(-count // (config.splits * config.block_m)) * config.block_m
    splits, tiles = -(-count // share), -(-channels // config.block_c)
    pivots, sums = x.new_empty(2, splits, channels, dtype=torch.float32)
    grams = x.new_empty(splits, channels, channels, dtype=torch.float32)
    run(
        Launch(
            gram_kernel,
            splits * tiles * tiles,
            {
                "x_ptr": x,
                "out_pivot_ptr": pivots,
                "out_sum_ptr": sums,
                "out_ptr": grams,
                "rows": count,
                "share": share,
            },
            {
                "C": channels,
                "PRECISION": dot_precision(x.dtype, convolution=True, exact=float32_products(device)),
                "BLOCK_M": config.block_m,
                "BLOCK_C": config.block_c,
                "NUM_STAGES": config.num_stages,
            },
            question,
            config.num_warps,
            config.num_stages,
        )
    )
    counts = _counts(splits, share, count, x.device)[:, None]
    sums = sums.double()
    means = pivots.double() + sums / counts
    mean = (means * counts).sum(0) / count
    apart = (means - mean) * counts.sqrt()
    within = grams.double().sum(0) - (sums / counts).T @ sums
    return mean, (within + apart.T @ apart) / count
