"""Gradients of attention with a learned bias: of queries, keys and values, and of the bias; without atomics.

With s = q · kᵀ * key_dim**-0.5 + bias, P = softmax(s), O = P · v and D the gradient of O:

    dP = D · vᵀ     ds = P * (dP - rowsum(P * dP))     dv = Pᵀ · D     dq, dk = key_dim**-0.5 * (ds · k, dsᵀ · q)

The bias' gradient is the sum of ds over the images. Nothing but q, k, v and the bias is needed: the forward keeps no
probabilities. Few tokens are one tile: one kernel does it all, and adds up ds in registers over some images. More
tokens take three kernels: of each row the maximum, the sum and rowsum(P * dP); then the gradients of q, k and v, tile
by tile; then ds again, added up over the images. Parts of the sum over images are added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .attention_pieces import add_products, load_pieces, of_probabilities, store_pieces, zero_pieces
from .bias_attention import MOST_OFFSET, _key_widths, _scores, _times
from .bias_attention_backward_tiles import (
    attention_bias_backward_kernel,
    attention_rows_backward_kernel,
    attention_tokens_backward_kernel,
)
from .launch import Launch, dot_precision, kernel, run
from .layout import new_tokens
from .register import register_gradients
from .rows import split
from .tiling.choose import Question, attention_backward_config
from .tiling.device import device_of


@kernel
def attention_backward_kernel(
    qkv_ptr,
    bias_ptr,
    grad_ptr,
    out_ptr,
    out_bias_ptr,
    batch,
    splits,
    N,
    HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_WIDTHS: tl.constexpr,
    VALUE_WIDTHS: tl.constexpr,
    SCALE: tl.constexpr,
    OF_QKV: tl.constexpr,
    OF_BIAS: tl.constexpr,
    DENSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """N <= BLOCK_M. A program takes a head and every splits-th image, and sums ds over these, [splits, heads, N, N]."""
    WIDTH: tl.constexpr = 2 * KEY_DIM + VALUE_DIM
    STRIDE: tl.constexpr = HEADS * WIDTH
    i_h = tl.program_id(0) % HEADS
    i_s = tl.program_id(0) // HEADS
    n = tl.arange(0, BLOCK_M)
    there = n < N
    p_bias = bias_ptr + i_h.to(tl.int64) * N * N + _times(n, N, DENSE)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    zero = tl.zeros((), tl.int64)
    for b in tl.range(i_s, batch, splits, num_stages=NUM_STAGES):
        image = (zero + b) * N
        p_head = qkv_ptr + image * STRIDE + i_h * WIDTH
        b_q = load_pieces(p_head, n, there, STRIDE, KEY_DIM, KEY_WIDTHS, DENSE)
        b_k = load_pieces(p_head + KEY_DIM, n, there, STRIDE, KEY_DIM, KEY_WIDTHS, DENSE)
        b_v = load_pieces(p_head + 2 * KEY_DIM, n, there, STRIDE, VALUE_DIM, VALUE_WIDTHS, DENSE)
        p_grad = grad_ptr + image * (HEADS * VALUE_DIM) + i_h * VALUE_DIM
        b_grad = load_pieces(p_grad, n, there, HEADS * VALUE_DIM, VALUE_DIM, VALUE_WIDTHS, DENSE)
        b_s = _scores(
            b_q, p_head, p_bias, there, n, N, STRIDE, 1, 1, KEY_DIM, KEY_WIDTHS, SCALE, DENSE, False, PRECISION
        )
        b_p = tl.math.exp2((b_s - tl.max(b_s, 1)[:, None]) * (SCALE * 1.4426950408889634))
        b_p = tl.where(there[:, None], b_p * (1.0 / tl.sum(b_p, 1))[:, None], 0.0)
        b_dp = of_probabilities(b_grad, b_v, VALUE_WIDTHS, PRECISION)
        b_ds = b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None])
        if OF_BIAS:
            total += b_ds
        if OF_QKV:
            p_out = out_ptr + image * STRIDE + i_h * WIDTH
            b_dq = add_products(zero_pieces(KEY_WIDTHS, BLOCK_M), b_ds, b_k, KEY_WIDTHS, PRECISION)
            store_pieces(p_out, b_dq, SCALE, n, there, STRIDE, KEY_DIM, KEY_WIDTHS, DENSE)
            b_dk = add_products(zero_pieces(KEY_WIDTHS, BLOCK_M), b_ds.T, b_q, KEY_WIDTHS, PRECISION)
            store_pieces(p_out + KEY_DIM, b_dk, SCALE, n, there, STRIDE, KEY_DIM, KEY_WIDTHS, DENSE)
            b_dv = add_products(zero_pieces(VALUE_WIDTHS, BLOCK_M), b_p.T, b_grad, VALUE_WIDTHS, PRECISION)
            store_pieces(p_out + 2 * KEY_DIM, b_dv, 1.0, n, there, STRIDE, VALUE_DIM, VALUE_WIDTHS, DENSE)
    if OF_BIAS:
        p_total = out_bias_ptr + (i_s * HEADS + i_h).to(tl.int64) * N * N + _times(n, N, DENSE)[:, None] + n[None, :]
        tl.store(p_total, total, mask=there[:, None] & there[None, :])


def attention_backward_launches(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor,
    num_heads: int,
    key_dim: int,
    out: Tensor | None,
    out_bias: Tensor | None,
) -> list[Launch]:
    """Compute the gradients whose `out` or `out_bias` is given; all tensors are contiguous.

    grad [B, N, heads * value_dim] in qkv's dtype, qkv and out [B, N, heads * (2 * key_dim + value_dim)],
    bias [heads, N, N] float32, out_bias [splits, heads, N, N] float32 (`new_bias_parts`).
    """
    batch, tokens, channels = qkv.shape
    value_dim = channels // num_heads - 2 * key_dim
    question = _question(qkv, num_heads, key_dim)
    device = device_of(qkv.device)
    config = attention_backward_config(question, device)
    tiles = -(-tokens // config.block_m)
    splits = batch if out_bias is None else len(out_bias)
    inputs: dict[str, Any] = {"qkv_ptr": qkv, "bias_ptr": bias, "grad_ptr": grad, "N": tokens}
    constants: dict[str, Any] = {
        "HEADS": num_heads,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "KEY_WIDTHS": _key_widths(key_dim, qkv.dtype),
        "VALUE_WIDTHS": split(value_dim, pieces=8),
        "SCALE": key_dim**-0.5,
        "DENSE": tokens * max(channels, tokens) < MOST_OFFSET,
        "PRECISION": dot_precision(qkv.dtype, convolution=False),
        "BLOCK_M": config.block_m,
        "NUM_STAGES": config.num_stages,
    }

    def launch(kernel: Any, grid: int, arguments: dict[str, Any], **more: Any) -> Launch:
        return Launch(kernel, grid, inputs | arguments, constants | more, question, config.num_warps, config.num_stages)

    of_bias = {"out_bias_ptr": out_bias, "batch": batch, "splits": splits}
    if tiles == 1:
        switches = {"OF_QKV": out is not None, "OF_BIAS": out_bias is not None}
        return [launch(attention_backward_kernel, splits * num_heads, {"out_ptr": out, **of_bias}, **switches)]
    rows = qkv.new_empty(batch, num_heads, 3, tokens, dtype=torch.float32)
    programs = batch * num_heads * tiles
    found = [launch(attention_rows_backward_kernel, programs, {"out_ptr": rows})]
    if out is not None:
        found.append(launch(attention_tokens_backward_kernel, programs, {"row_ptr": rows, "out_ptr": out}))
    if out_bias is not None:
        programs = splits * num_heads * tiles**2
        found.append(launch(attention_bias_backward_kernel, programs, {"row_ptr": rows, **of_bias}))
    return found


def _question(qkv: Tensor, num_heads: int, key_dim: int) -> Question:
    value_dim = qkv.shape[2] // num_heads - 2 * key_dim
    return Question("attention_backward", qkv.dtype, (qkv.shape[1], max(key_dim, value_dim)))


def new_bias_parts(qkv: Tensor, num_heads: int, key_dim: int) -> Tensor:
    """An empty [splits, heads, N, N] float32: parts of the bias' gradient, each of some images."""
    splits = attention_backward_config(_question(qkv, num_heads, key_dim), device_of(qkv.device)).splits
    batch, tokens, _ = qkv.shape
    return qkv.new_empty(min(splits, batch), num_heads, tokens, tokens, dtype=torch.float32)


def attention_gradients(
    grad: Tensor, qkv: Tensor, bias: Tensor, num_heads: int, key_dim: int, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of qkv, contiguous in its dtype, and of the bias, float32 [heads, N, N], where `needed`."""
    if not any(needed):
        return None, None
    grad, qkv, bias = grad.to(qkv.dtype).contiguous(), qkv.contiguous(), bias.contiguous()
    out = torch.empty_like(qkv) if needed[0] else None
    parts = new_bias_parts(qkv, num_heads, key_dim) if needed[1] else None
    if qkv.numel():
        run(*attention_backward_launches(grad, qkv, bias, num_heads, key_dim, out, parts))
    return out, None if parts is None else parts.sum(0)


bias_attention_backward = register_gradients(
    "bias_attention_backward(Tensor grad, Tensor qkv, Tensor bias, int num_heads, int key_dim, bool[] needed) "
    "-> Tensor[]",
    attention_gradients,
    new_tokens,
)
