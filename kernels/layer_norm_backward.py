"""Gradients of LayerNorm with the residual around its block, y = x + f(norm(x)).

With x̂ the normalised rows, g the gradient of norm(x) and wg = weight * g:

    dx = dy + (wg - mean(wg) - x̂ * mean(wg * x̂)) / deviation     d weight = Σ g * x̂     d bias = Σ g

Each program sums over several tiles of rows, and writes its sums once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from .launch import Launch, kernel, run
from .layout import Rows, token_rows
from .rows import locate, row_offsets
from .tiling.choose import Question, norm_config
from .tiling.device import device_of

TILES = 8  # of a program


@kernel
def layer_norm_backward_kernel(
    x_ptr,
    grad_ptr,
    residual_ptr,
    weight_ptr,
    size_ptr,
    out_ptr,
    out_weight_ptr,
    out_bias_ptr,
    rows,
    H,
    W,
    eps,
    stride_xb,
    stride_xh,
    stride_xw,
    stride_gb,
    stride_gh,
    stride_gw,
    stride_rb,
    stride_rh,
    stride_rw,
    C: tl.constexpr,
    X_FLAT: tl.constexpr,
    GRAD_FLAT: tl.constexpr,
    RESIDUAL_FLAT: tl.constexpr,
    OF_X: tl.constexpr,
    OF_NORM: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad is the gradient of norm(x) divided by the number at `size_ptr`; out [rows, C] in a line."""
    c = tl.arange(0, BLOCK_C)
    there = (c < C)[None, :]
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0)[None, :]
    size = tl.load(size_ptr)
    of_weight = tl.zeros((BLOCK_C,), tl.float32)
    of_bias = tl.zeros((BLOCK_C,), tl.float32)
    for i in tl.range(0, TILES, num_stages=1):
        row, b, h, w, inside = locate(tl.program_id(0) * TILES + i, rows, H, W, BLOCK_M)
        mask = inside[:, None] & there
        o_x = row_offsets(row, b, h, w, stride_xb, stride_xh, stride_xw, X_FLAT)[:, None] + c[None, :]
        b_x = tl.load(x_ptr + o_x, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(there, b_x - (tl.sum(b_x, 1) / C)[:, None], 0.0)
        reciprocal = (1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / C + eps))[:, None]
        normalised = centred * reciprocal
        o_grad = row_offsets(row, b, h, w, stride_gb, stride_gh, stride_gw, GRAD_FLAT)[:, None] + c[None, :]
        b_grad = tl.load(grad_ptr + o_grad, mask=mask, other=0.0).to(tl.float32)
        if OF_NORM:
            of_weight += tl.sum(b_grad * normalised, 0)
            of_bias += tl.sum(b_grad, 0)
        if OF_X:
            weighted = weight * b_grad
            mean = (tl.sum(weighted, 1) / C)[:, None]
            along = (tl.sum(weighted * normalised, 1) / C)[:, None]
            moved = (weighted - mean - normalised * along) * (reciprocal * size)
            o_residual = row_offsets(row, b, h, w, stride_rb, stride_rh, stride_rw, RESIDUAL_FLAT)
            b_residual = tl.load(residual_ptr + o_residual[:, None] + c[None, :], mask=mask, other=0.0)
            p_out = out_ptr + row.to(tl.int64)[:, None] * C + c[None, :]
            tl.store(p_out, (b_residual.to(tl.float32) + moved).to(out_ptr.dtype.element_ty), mask=mask)
    if OF_NORM:
        o_sum = tl.program_id(0).to(tl.int64) * C + c
        tl.store(out_weight_ptr + o_sum, of_weight * size, mask=c < C)
        tl.store(out_bias_ptr + o_sum, of_bias * size, mask=c < C)


def layer_norm_backward_launch(
    x: Rows,
    grad: Rows,
    residual: Rows,
    weight: Tensor,
    size: Tensor,
    eps: float,
    out: Tensor | None,
    sums: Tensor | None,
) -> Launch:
    """x, grad and residual over the same rows; out contiguous in x's dtype; sums [2, programs, C], by `new_sums`."""
    block_m, block_c, num_warps, question = _tiles(x)
    return Launch(
        layer_norm_backward_kernel,
        _programs(x),
        {
            **x.sizes,
            **x.pointer("x"),
            **grad.pointer("grad"),
            **residual.pointer("residual"),
            "weight_ptr": weight,
            "size_ptr": size,
            "out_ptr": out,
            "out_weight_ptr": None if sums is None else sums[0],
            "out_bias_ptr": None if sums is None else sums[1],
            "eps": eps,
        },
        {
            "C": x.channels,
            "X_FLAT": x.flat,
            "GRAD_FLAT": grad.flat,
            "RESIDUAL_FLAT": residual.flat,
            "OF_X": out is not None,
            "OF_NORM": sums is not None,
            "TILES": TILES,
            "BLOCK_M": block_m,
            "BLOCK_C": block_c,
        },
        question,
        num_warps,
    )


def _tiles(x: Rows) -> tuple[int, int, int, Question]:
    question = Question("layer_norm", x.tensor.dtype, (x.channels, x.count))
    return *norm_config(question, device_of(x.tensor.device)), question


def _programs(x: Rows) -> int:
    return -(-x.count // (_tiles(x)[0] * TILES))


def new_sums(x: Rows) -> Tensor:
    """Empty partial sums of the gradients of weight and bias, float32 [2, programs, C]."""
    return x.tensor.new_empty(2, _programs(x), x.channels, dtype=torch.float32)


def layer_norm_gradients(
    grad: Tensor, x: Tensor, residual: Tensor, weight: Tensor, size: Tensor, eps: float, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x (contiguous, in its dtype), weight and bias (float32 [C]), where `needed`.

    x, residual and grad [B, N, C], channels next to each other; residual is the gradient of the block's result, grad
    that of norm(x) divided by size [1].
    """
    rows = token_rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needed[0] else None
    sums = new_sums(rows) if any(needed[1:]) else None
    if x.numel():
        run(layer_norm_backward_launch(rows, token_rows(grad), token_rows(residual), weight, size, eps, out, sums))
    weight_sum, bias_sum = (sums[at].sum(0) if sums is not None and needed[1 + at] else None for at in range(2))
    return out, weight_sum, bias_sum
