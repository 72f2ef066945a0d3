"""Gradients of the MLP z = x + scale2 * (W2 · act(scale1 * (W1 · x) + shift1)) + shift2, the hidden computed anew.

A kernel writes the hidden activations and the gradients before them, for some rows at a time; the vendor's products do
the rest. With t = W1 · x and dh the gradient at the activation's input, all sums over rows:

    d W1 = scale1 * Σ dh xᵀ      d scale1 = Σ dh * t                                         d shift1 = Σ dh
    d W2 = scale2 * Σ dz actᵀ    d scale2 = Σ dz * (W2 · act) = rows of W2 * (Σ dz actᵀ)     d shift2 = Σ dz
    d x = dz + (scale1 * W1)ᵀ dh
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .activation import activate, form
from .activation_backward import slope
from .launch import Launch, dot_precision, float32_products, kernel, run
from .layout import Rows, dense_map, map_rows
from .products import add_product
from .rows import locate, row_offsets
from .tiling.choose import Question, linear_config
from .tiling.device import device_of
from .tiling.table import LinearConfig

MOST_HIDDEN = 1 << 25  # elements of the hidden rows that are in memory at a time, of each of two tensors


@kernel
def mlp_backward_kernel(
    x_ptr,
    grad_ptr,
    weight1_ptr,
    scale1_ptr,
    shift1_ptr,
    weight2_ptr,
    out_ptr,
    out_grad_ptr,
    out_sum_ptr,
    out_product_ptr,
    first,
    rows,
    H,
    W,
    stride_xb,
    stride_xh,
    stride_xw,
    stride_gb,
    stride_gh,
    stride_gw,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    X_FLAT: tl.constexpr,
    GRAD_FLAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Rows from `first`, a multiple of BLOCK_M, on: act and dh [rows, HIDDEN], sums of dh, dh * t [tiles, HIDDEN]."""
    i_n = tl.program_id(0) % tl.cdiv(HIDDEN, BLOCK_N)
    i_m = tl.program_id(0) // tl.cdiv(HIDDEN, BLOCK_N)
    row, b, h, w, inside = locate(first // BLOCK_M + i_m, rows, H, W, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < HIDDEN
    p_x = x_ptr + row_offsets(row, b, h, w, stride_xb, stride_xh, stride_xw, X_FLAT)[:, None] + k[None, :]
    p_grad = grad_ptr + row_offsets(row, b, h, w, stride_gb, stride_gh, stride_gw, GRAD_FLAT)[:, None] + k[None, :]

    b_t = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b_g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for c in tl.range(0, C, BLOCK_K, num_stages=NUM_STAGES):
        exists = c + k < C
        b_x = tl.load(p_x, mask=exists[None, :], other=0.0)
        b_w1 = tl.load(
            weight1_ptr + n[None, :] * C + (c + k)[:, None], mask=there[None, :] & exists[:, None], other=0.0
        )
        b_t = add_product(b_t, b_x, b_w1, PRECISION)
        b_grad = tl.load(p_grad, mask=inside[:, None] & exists[None, :], other=0.0)
        b_w2 = tl.load(
            weight2_ptr + (c + k)[:, None] * HIDDEN + n[None, :], mask=there[None, :] & exists[:, None], other=0.0
        )
        b_g = add_product(b_g, b_grad, b_w2, PRECISION)
        p_x += BLOCK_K
        p_grad += BLOCK_K

    scale1 = tl.load(scale1_ptr + n, mask=there, other=0.0)[None, :]
    shift1 = tl.load(shift1_ptr + n, mask=there, other=0.0)[None, :]
    b_hidden = b_t * scale1 + shift1
    b_act = activate(b_hidden, ACTIVATION)
    b_dh = tl.where(inside[:, None], b_g * slope(b_hidden, ACTIVATION), 0.0)
    o_out = (row - first).to(tl.int64)[:, None] * HIDDEN + n[None, :]
    mask = inside[:, None] & there[None, :]
    tl.store(out_ptr + o_out, b_act.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_grad_ptr + o_out, b_dh.to(out_ptr.dtype.element_ty), mask=mask)
    o_sum = i_m.to(tl.int64) * HIDDEN + n
    tl.store(out_sum_ptr + o_sum, tl.sum(b_dh, 0), mask=there)
    tl.store(out_product_ptr + o_sum, tl.sum(b_dh * b_t, 0), mask=there)


class Scratch(NamedTuple):
    """Results of the kernel for some rows: act and dh [rows, hidden], and sums of dh and dh * t [tiles, hidden]."""

    act: Tensor
    grad: Tensor
    sums: Tensor
    products: Tensor


class Gradients(NamedTuple):
    """Of x, W1, scale1, shift1, W2, scale2, shift2; None where it is not needed. Of all but x in float32."""

    x: Tensor | None
    weight1: Tensor | None
    scale1: Tensor | None
    shift1: Tensor | None
    weight2: Tensor | None
    scale2: Tensor | None
    shift2: Tensor | None


class Needed(NamedTuple):
    """Which of `Gradients` to compute."""

    x: bool
    weight1: bool
    scale1: bool
    shift1: bool
    weight2: bool
    scale2: bool
    shift2: bool


class BackwardMlp(NamedTuple):
    """weight1 [hidden, C] and weight2 [C, hidden] in the products' dtype, vectors in float32; all contiguous."""

    weight1: Tensor
    scale1: Tensor
    shift1: Tensor
    weight2: Tensor
    scale2: Tensor
    activation: str


def mlp_backward_launch(x: Rows, grad: Rows, mlp: BackwardMlp, first: int, scratch: Scratch) -> Launch:
    """Rows from `first` on, as many as the scratch has; x and grad over the same images, in the weights' dtype.

    grad is scale2 times the gradient of the MLP's result.
    """
    hidden, channels = mlp.weight1.shape
    block_m, block_n, config, question = _tiles(mlp, x.count)
    device = device_of(mlp.weight1.device)
    return Launch(
        mlp_backward_kernel,
        -(-len(scratch.act) // block_m) * -(-hidden // block_n),
        {
            **x.sizes,
            **x.pointer("x"),
            **grad.pointer("grad"),
            "weight1_ptr": mlp.weight1,
            "scale1_ptr": mlp.scale1,
            "shift1_ptr": mlp.shift1,
            "weight2_ptr": mlp.weight2,
            "out_ptr": scratch.act,
            "out_grad_ptr": scratch.grad,
            "out_sum_ptr": scratch.sums,
            "out_product_ptr": scratch.products,
            "first": first,
            "rows": first + len(scratch.act),
        },
        {
            "C": channels,
            "HIDDEN": hidden,
            "X_FLAT": x.flat,
            "GRAD_FLAT": grad.flat,
            "ACTIVATION": form(mlp.activation, mlp.weight1.dtype).removesuffix("_x2"),  # the act itself is stored
            "PRECISION": dot_precision(mlp.weight1.dtype, convolution=True, exact=float32_products(device)),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": config.block_k,
            "NUM_STAGES": config.num_stages,
        },
        question,
        config.num_warps,
        config.num_stages,
    )


def _tiles(mlp: BackwardMlp, rows: int) -> tuple[int, int, LinearConfig, Question]:
    """Rows and hidden channels of a tile, and the rest of the configuration."""
    question = Question("mlp_backward", mlp.weight1.dtype, (*mlp.weight1.shape, rows))
    config = linear_config(question, device_of(mlp.weight1.device))
    return config.block_m, sum(config.widths), config, question


def mlp_gradients(grad: Tensor, x: Tensor, mlp: BackwardMlp, needed: Needed) -> Gradients:
    """The gradients that are `needed`; x's as rows [rows, C] in its dtype.

    grad and x [B, C, H, W] of one dtype, with channels next to each other (`dense_map`).
    """
    dtype = mlp.weight1.dtype
    x = dense_map(x.to(dtype))  # a cast may lay the channels of an expanded map apart
    source, x_rows, grad_rows = map_rows(x), _flat(x), _flat(grad)
    count, channels, hidden = source.count, source.channels, len(mlp.weight1)
    shift2 = grad_rows.sum(0, dtype=torch.float32) if needed.shift2 else None
    if not any(needed[:-1]):
        return Gradients(None, None, None, None, None, None, shift2)

    scaled, size = _scaled(grad, mlp.scale2, dtype)
    above = map_rows(scaled)
    of_second = needed.weight2 or needed.scale2
    block_m, _, _, _ = _tiles(mlp, count)
    most = max(1, MOST_HIDDEN // hidden // block_m) * block_m
    most = min(most, -(-max(count, 1) // block_m) * block_m)
    act, dh = (x.new_empty(most, hidden, dtype=dtype) for _ in range(2))
    sums, products = (x.new_empty(-(-most // block_m), hidden, dtype=torch.float32) for _ in range(2))
    first_sum = x.new_zeros(hidden, channels, dtype=torch.float32) if needed.weight1 else None
    second_sum = x.new_zeros(channels, hidden, dtype=torch.float32) if of_second else None
    scale1, shift1 = (x.new_zeros(hidden, dtype=torch.float32) for _ in range(2))
    out = torch.empty_like(grad_rows) if needed.x else None
    weight1 = (mlp.weight1.float() * mlp.scale1[:, None]).to(dtype) if needed.x else None
    for first in range(0, count, most):
        part = slice(first, min(first + most, count))
        length = part.stop - first
        tiles = -(-length // block_m)
        scratch = Scratch(act[:length], dh[:length], sums[:tiles], products[:tiles])
        run(mlp_backward_launch(source, above, mlp, first, scratch))
        if first_sum is not None:
            first_sum += _product(scratch.grad.T, x_rows[part])
        if second_sum is not None:
            second_sum += _product(grad_rows[part].to(dtype).T, scratch.act)
        if needed.shift1:
            shift1 += scratch.sums.sum(0)
        if needed.scale1:
            scale1 += scratch.products.sum(0)
        if out is not None and weight1 is not None:
            torch.addcmul(grad_rows[part], torch.mm(scratch.grad, weight1), size, out=out[part])
    return Gradients(
        out,
        None if first_sum is None else first_sum * (size * mlp.scale1)[:, None],
        scale1 * size if needed.scale1 else None,
        shift1 * size if needed.shift1 else None,
        second_sum * mlp.scale2[:, None] if needed.weight2 and second_sum is not None else None,
        (second_sum.double() * mlp.weight2).sum(1).float() if needed.scale2 and second_sum is not None else None,
        shift2,
    )


def _scaled(grad: Tensor, scale2: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """scale2 * grad [B, C, H, W] in `dtype`, divided by a number [1].

    A power of two near the root of the largest scale: it keeps a float16 gradient from underflow behind a small layer
    scale, and from overflow, and adds no rounding.

    A pass of its own: the kernel's products take it as it lies in memory. Scaled in registers, it would be overwritten
    while Hopper's matrix units still read it (Triton 3.7, seen in the executed PTX). In place of it, a scaled weight
    would be rounded alike for all rows, and the error would not average out.
    """
    size = scale2.abs().amax(0, keepdim=True)
    size = torch.where(size > 0, torch.exp2(torch.floor(0.5 * torch.log2(size))), 1.0)
    scaled = torch.empty_like(grad, dtype=dtype, memory_format=torch.channels_last)
    torch.mul(grad, (scale2 / size)[:, None, None], out=scaled)
    return scaled, size


def _flat(x: Tensor) -> Tensor:
    """The rows [rows, C] of a map [B, C, H, W]; a view where they lie in one line."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a · b by the vendor's library, in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
