"""Gradients of the pooling token mixer: dx = dy + layer_scale * (Pᵀ dy - dy), P being the average over 3x3 pixels.

P divides by the number of pixels that exist around the one it computes. So its transpose weighs each pixel by that
pixel's own number. The gradient of the layer scale is the sum of x * (Pᵀ dy - dy) over all pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, kernel, run
from .layout import map_rows, new_map
from .register import register_gradients
from .rows import locate, row_offsets
from .tiling.choose import Question, pool_config
from .tiling.device import device_of


@kernel
def pool_mixer_backward_kernel(
    grad_ptr,
    x_ptr,
    layer_scale_ptr,
    keep_ptr,
    out_ptr,
    out_sum_ptr,
    rows,
    H,
    W,
    stride_gb,
    stride_gh,
    stride_gw,
    stride_gc,
    stride_xb,
    stride_xh,
    stride_xw,
    stride_xc,
    stride_ob,
    stride_oh,
    stride_ow,
    stride_oc,
    C: tl.constexpr,
    GRAD_FLAT: tl.constexpr,
    X_FLAT: tl.constexpr,
    OUT_FLAT: tl.constexpr,
    KEEP: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_c = tl.program_id(0) % tl.cdiv(C, BLOCK_C)
    i_m = tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    row, b, h, w, inside = locate(i_m, rows, H, W, BLOCK_M)
    c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = inside[:, None]
    if C % BLOCK_C != 0:
        mask = mask & (c < C)[None, :]
    o_grad = row_offsets(row, b, h, w, stride_gb, stride_gh, stride_gw, GRAD_FLAT)
    p_grad = grad_ptr + o_grad[:, None] + (c.to(tl.int64) * stride_gc)[None, :]
    grad = tl.load(p_grad, mask=mask, other=0.0).to(tl.float32)
    moved = -grad
    for i in tl.static_range(3):
        line, lines = _averaged(h + (i - 1), H)
        for j in tl.static_range(3):
            column, columns = _averaged(w + (j - 1), W)
            there = line & column
            step = tl.where(line, (i - 1) * stride_gh, 0) + tl.where(column, (j - 1) * stride_gw, 0)
            near = tl.load(p_grad + step[:, None], mask=mask & there[:, None], other=0.0).to(tl.float32)
            moved += (1.0 / (lines * columns))[:, None] * near  # rounded once: the error would not average out

    layer_scale = tl.load(layer_scale_ptr + c, mask=c < C, other=0.0)[None, :]
    if KEEP:
        moved *= tl.load(keep_ptr + b)[:, None]
    o_out = row_offsets(row, b, h, w, stride_ob, stride_oh, stride_ow, OUT_FLAT)
    p_out = out_ptr + o_out[:, None] + (c.to(tl.int64) * stride_oc)[None, :]
    tl.store(p_out, (grad + layer_scale * moved).to(out_ptr.dtype.element_ty), mask=mask)
    if SCALE:
        o_x = row_offsets(row, b, h, w, stride_xb, stride_xh, stride_xw, X_FLAT)
        channels = (c.to(tl.int64) * stride_xc)[None, :]
        x = tl.load(x_ptr + o_x[:, None] + channels, mask=mask, other=0.0).to(tl.float32)
        # Over an image `moved` sums to 0, so any constant may be taken from x. Without its first pixel a mean of 4
        # deviations would cost float32 its accuracy.
        first = tl.load(x_ptr + (b.to(tl.int64) * stride_xb)[:, None] + channels, mask=mask, other=0.0).to(tl.float32)
        total = tl.sum(tl.where(mask, (x - first) * moved, 0.0), 0)
        tl.store(out_sum_ptr + i_m.to(tl.int64) * C + c, total, mask=c < C)


@triton.jit
def _averaged(i, SIZE):
    """Whether line (or column) i exists, and the number of lines that an average at line i is over."""
    count = 1.0 + tl.where(i > 0, 1.0, 0.0) + tl.where(i < SIZE - 1, 1.0, 0.0)
    return (i >= 0) & (i < SIZE), count


def pool_mixer_backward_launch(
    grad: Tensor, x: Tensor, layer_scale: Tensor, keep: Tensor | None, out: Tensor, sums: Tensor | None
) -> Launch:
    """grad, x and out [B, C, H, W] of any strides; all others float32: layer_scale [C], keep [B], sums [tiles, C]."""
    source, other, target = map_rows(grad), map_rows(x), map_rows(out)
    question, (block_m, block_c, num_warps) = _tiles(grad)
    return Launch(
        pool_mixer_backward_kernel,
        -(-source.count // block_m) * -(-source.channels // block_c),
        {
            **source.sizes,
            **source.pointer("grad"),
            **other.pointer("x"),
            **target.pointer("out"),
            "layer_scale_ptr": layer_scale,
            "keep_ptr": keep,
            "out_sum_ptr": sums,
            "stride_gc": grad.stride(1),
            "stride_xc": x.stride(1),
            "stride_oc": out.stride(1),
        },
        {
            "C": source.channels,
            "GRAD_FLAT": source.flat,
            "X_FLAT": other.flat,
            "OUT_FLAT": target.flat,
            "KEEP": keep is not None,
            "SCALE": sums is not None,
            "BLOCK_M": block_m,
            "BLOCK_C": block_c,
        },
        question,
        num_warps,
    )


def new_sums(grad: Tensor) -> Tensor:
    """Empty partial sums of the layer scale's gradient: a row for each tile of rows."""
    _, (block_m, _, _) = _tiles(grad)
    return grad.new_empty(-(-map_rows(grad).count // block_m), grad.shape[1], dtype=torch.float32)


def _tiles(grad: Tensor) -> tuple[Question, tuple[int, int, int]]:
    rows = map_rows(grad)
    question = Question("pool_mixer", grad.dtype, (rows.channels, int(grad.stride(1) == 1), rows.count))
    return question, pool_config(question, device_of(grad.device))


def pool_mixer_gradients(
    grad: Tensor, x: Tensor, layer_scale: Tensor, needed: Sequence[bool], keep: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x, in its dtype and layout (`new_map`), and of the layer scale, float32 [C], where `needed`.

    keep [B] float32 are the factors of stochastic depth, by which the branch of each image was multiplied.
    """
    if not any(needed):
        return None, None
    out = new_map(x)
    sums = new_sums(grad) if needed[1] else None
    if grad.numel():
        run(pool_mixer_backward_launch(grad, x, layer_scale.contiguous(), keep, out, sums))
    return out if needed[0] else None, None if sums is None else sums.sum(0)


pool_mixer_backward = register_gradients(
    "pool_mixer_backward(Tensor grad, Tensor x, Tensor layer_scale, bool[] needed) -> Tensor[]",
    pool_mixer_gradients,
    new_map,
)
