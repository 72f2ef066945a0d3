"""Gradients of the MLP z = x + scale2 * (W2 · act(scale1 * (W1 · x) + shift1)) + shift2, the hidden computed anew.

A kernel writes the hidden activations and the gradients before them, for some rows at a time; the vendor's products do
the rest (`mlp_sums`). With t = W1 · x and dh the gradient at the activation's input, all sums over rows:

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
from .layout import Rows, map_rows
from .products import add_product
from .rows import locate, row_offsets
from .tiling.choose import Question, linear_config
from .tiling.device import device_of
from .tiling.table import LinearConfig
from .vendor import flat_map, float32_product

MOST_HIDDEN = 1 << 25  # elements of the hidden rows that are in memory at a time, of each of two tensors


@kernel
def mlp_backward_kernel(
    x_ptr,
    grad_ptr,
    weight1_ptr,
    scale1_ptr,
    shift1_ptr,
    centre_ptr,
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
    HAS_SCALE: tl.constexpr,
    HAS_CENTRE: tl.constexpr,
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

    b_hidden = b_t + 0.0
    if HAS_SCALE:
        b_hidden *= tl.load(scale1_ptr + n, mask=there, other=0.0)[None, :]
    b_hidden += tl.load(shift1_ptr + n, mask=there, other=0.0)[None, :]
    b_act = activate(b_hidden, ACTIVATION)
    b_dh = tl.where(inside[:, None], b_g * slope(b_hidden, ACTIVATION), 0.0)
    o_out = (row - first).to(tl.int64)[:, None] * HIDDEN + n[None, :]
    mask = inside[:, None] & there[None, :]
    tl.store(out_ptr + o_out, b_act.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_grad_ptr + o_out, b_dh.to(out_ptr.dtype.element_ty), mask=mask)
    o_sum = i_m.to(tl.int64) * HIDDEN + n
    tl.store(out_sum_ptr + o_sum, tl.sum(b_dh, 0), mask=there)
    if HAS_CENTRE:  # taken away here, it leaves no difference of large sums
        b_t -= tl.load(centre_ptr + n, mask=there, other=0.0)[None, :]
    tl.store(out_product_ptr + o_sum, tl.sum(b_dh * b_t, 0), mask=there)


class Scratch(NamedTuple):
    """Results of the kernel for some rows: act and dh [rows, hidden], and sums of dh and dh * t [tiles, hidden]."""

    act: Tensor
    grad: Tensor
    sums: Tensor
    products: Tensor


class BackwardMlp(NamedTuple):
    """weight1 [hidden, C] and weight2 [C, hidden] in the products' dtype, vectors in float32; all contiguous.

    Without a scale1 it is 1. `convolution`: the products stand for 1x1 convolutions. `centre` [hidden] is taken from t
    in the sum of dh * t.
    """

    weight1: Tensor
    scale1: Tensor | None
    shift1: Tensor
    weight2: Tensor
    activation: str
    convolution: bool = True
    centre: Tensor | None = None


class Wanted(NamedTuple):
    """Which of `Sums` to compute."""

    x: bool
    weight1: bool
    scale1: bool
    shift1: bool
    weight2: bool


class Sums(NamedTuple):
    """Parts of an MLP's gradients. A caller that divided `grad` by a number multiplies each part by it.

    Attributes:
        x: (scale1 * W1)ᵀ dh of each row, [rows, C] in the products' dtype.
        weight1: Σ dh rightᵀ, [hidden, C].
        scale1, shift1: Σ dh * (t - centre) and Σ dh, [hidden].
        weight2: Σ left actᵀ, [C, hidden].

    Sums are float32. Parts that are not wanted are None.
    """

    x: Tensor | None
    weight1: Tensor | None
    scale1: Tensor | None
    shift1: Tensor | None
    weight2: Tensor | None


def mlp_backward_launch(x: Rows, grad: Rows, mlp: BackwardMlp, first: int, scratch: Scratch) -> Launch:
    """Rows from `first` on, as many as the scratch has; x and grad over the same images, in the weights' dtype.

    grad is the gradient of W2 · act.
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
            "centre_ptr": mlp.centre,
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
            "HAS_SCALE": mlp.scale1 is not None,
            "HAS_CENTRE": mlp.centre is not None,
            "X_FLAT": x.flat,
            "GRAD_FLAT": grad.flat,
            "ACTIVATION": form(mlp.activation, mlp.weight1.dtype).removesuffix("_x2"),  # the act itself is stored
            "PRECISION": dot_precision(mlp.weight1.dtype, convolution=mlp.convolution, exact=float32_products(device)),
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


def mlp_sums(
    x: Tensor, grad: Tensor, left: Tensor, mlp: BackwardMlp, wanted: Wanted, right: Tensor | None = None
) -> Sums:
    """Compute what is `wanted`, the hidden activations for a part of the rows at a time.

    x and grad [B, C, H, W] in the weights' dtype, with channels next to each other (`dense_map`); grad is the gradient
    of W2 · act. left [rows, C] is multiplied with the activations, right [rows, C] (in place of x) with dh.
    """
    dtype, hidden = mlp.weight1.dtype, len(mlp.weight1)
    source, above, right = map_rows(x), map_rows(grad), flat_map(x) if right is None else right
    count, channels = source.count, source.channels
    block_m, _, _, _ = _tiles(mlp, count)
    parts = hidden_parts(count, hidden, block_m)
    act, dh = (x.new_empty(len(parts[0]) if parts else 0, hidden, dtype=dtype) for _ in range(2))
    partial = x.new_empty(2, -(-count // block_m), hidden, dtype=torch.float32)
    of_weight1, of_weight2 = None, None
    out = x.new_empty(count, channels) if wanted.x else None
    weight1 = _scaled_weight(mlp) if wanted.x else None
    for rows in parts:
        part, length, tile = slice(rows.start, rows.stop), len(rows), rows.start // block_m
        sums, products = partial[:, tile : tile - (-length // block_m)]
        scratch = Scratch(act[:length], dh[:length], sums, products)
        run(mlp_backward_launch(source, above, mlp, rows.start, scratch))
        if wanted.weight1:
            of_weight1 = _added(of_weight1, float32_product(scratch.grad.T, right[part]))
        if wanted.weight2:
            of_weight2 = _added(of_weight2, float32_product(left[part].T, scratch.act))
        if out is not None and weight1 is not None:
            torch.mm(scratch.grad, weight1, out=out[part])
    if not count:
        of_weight1, of_weight2 = x.new_zeros(hidden, channels).float(), x.new_zeros(channels, hidden).float()
    return Sums(
        out,
        of_weight1 if wanted.weight1 else None,
        partial[1].sum(0, dtype=torch.float64).float() if wanted.scale1 else None,
        partial[0].sum(0, dtype=torch.float64).float() if wanted.shift1 else None,
        of_weight2 if wanted.weight2 else None,
    )


def hidden_parts(count: int, hidden: int, multiple: int = 1) -> list[range]:
    """Share out `count` rows to parts whose hidden activations fit in memory, each a multiple of so many rows."""
    most = max(1, MOST_HIDDEN // hidden // multiple) * multiple
    return [range(first, min(first + most, count)) for first in range(0, count, most)]


def _scaled_weight(mlp: BackwardMlp) -> Tensor:
    """scale1 * W1 in the products' dtype."""
    if mlp.scale1 is None:
        return mlp.weight1
    return (mlp.weight1 * mlp.scale1[:, None]).to(mlp.weight1.dtype)


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)
