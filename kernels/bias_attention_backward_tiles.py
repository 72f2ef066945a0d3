"""Gradients of attention over many tiles of tokens: three kernels (`bias_attention_backward.py`)."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_pieces import add_products, load_pieces, of_probabilities, store_pieces, zero_pieces
from .bias_attention import _scores, _times
from .launch import kernel


@kernel
def attention_rows_backward_kernel(
    qkv_ptr,
    bias_ptr,
    grad_ptr,
    out_ptr,
    N,
    HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_WIDTHS: tl.constexpr,
    VALUE_WIDTHS: tl.constexpr,
    SCALE: tl.constexpr,
    DENSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Of each row of the scores its maximum, 1 / its sum and rowsum(P * dP), [batch, heads, 3, N]."""
    WIDTH: tl.constexpr = 2 * KEY_DIM + VALUE_DIM
    STRIDE: tl.constexpr = HEADS * WIDTH
    i_m = tl.program_id(0) % tl.cdiv(N, BLOCK_M)
    i_bh = tl.program_id(0) // tl.cdiv(N, BLOCK_M)
    i_h = i_bh % HEADS
    image = (i_bh // HEADS).to(tl.int64) * N
    m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < N
    p_head = qkv_ptr + image * STRIDE + i_h * WIDTH
    p_grad = grad_ptr + image * (HEADS * VALUE_DIM) + i_h * VALUE_DIM
    p_bias = bias_ptr + i_h.to(tl.int64) * N * N + _times(m, N, DENSE)[:, None]
    b_q = load_pieces(p_head, m, inside, STRIDE, KEY_DIM, KEY_WIDTHS, DENSE)
    b_grad = load_pieces(p_grad, m, inside, HEADS * VALUE_DIM, VALUE_DIM, VALUE_WIDTHS, DENSE)
    TO_BITS: tl.constexpr = SCALE * 1.4426950408889634
    b_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_weighted = tl.zeros((BLOCK_M,), tl.float32)
    for first in tl.range(0, N, BLOCK_M, num_stages=NUM_STAGES):
        n = first + tl.arange(0, BLOCK_M)
        b_v = load_pieces(p_head + 2 * KEY_DIM, n, n < N, STRIDE, VALUE_DIM, VALUE_WIDTHS, DENSE)
        b_s = _scores(
            b_q, p_head, p_bias, inside, n, N, STRIDE, 1, 1, KEY_DIM, KEY_WIDTHS, SCALE, DENSE, False, PRECISION
        )
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        shift = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_p = tl.math.exp2((b_s - shift[:, None]) * TO_BITS)
        fade = tl.math.exp2((b_max - shift) * TO_BITS)
        b_dp = of_probabilities(b_grad, b_v, VALUE_WIDTHS, PRECISION)
        b_sum = b_sum * fade + tl.sum(b_p, 1)
        b_weighted = b_weighted * fade + tl.sum(b_p * b_dp, 1)
        b_max = b_new
    p_out = out_ptr + i_bh.to(tl.int64) * 3 * N + m
    reciprocal = 1.0 / tl.where(inside, b_sum, 1.0)
    tl.store(p_out, b_max, mask=inside)
    tl.store(p_out + N, reciprocal, mask=inside)
    tl.store(p_out + 2 * N, b_weighted * reciprocal, mask=inside)


@triton.jit
def _of_scores(
    b_q, b_grad, b_v, p_head, p_bias, p_row, m, n, N, KEY_DIM: tl.constexpr, KEY_WIDTHS: tl.constexpr,
    VALUE_WIDTHS: tl.constexpr, STRIDE: tl.constexpr, SCALE: tl.constexpr, DENSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P and ds of the queries m and the keys n; zeros for what does not exist."""
    inside = m < N
    b_s = _scores(b_q, p_head, p_bias, inside, n, N, STRIDE, 1, 1, KEY_DIM, KEY_WIDTHS, SCALE, DENSE, False, PRECISION)
    b_max = tl.load(p_row + m, mask=inside, other=0.0)
    reciprocal = tl.load(p_row + N + m, mask=inside, other=0.0)
    b_weighted = tl.load(p_row + 2 * N + m, mask=inside, other=0.0)
    b_p = tl.math.exp2((b_s - b_max[:, None]) * (SCALE * 1.4426950408889634)) * reciprocal[:, None]
    b_dp = of_probabilities(b_grad, b_v, VALUE_WIDTHS, PRECISION)
    return b_p, b_p * (b_dp - b_weighted[:, None])


@kernel
def attention_tokens_backward_kernel(
    qkv_ptr,
    bias_ptr,
    grad_ptr,
    row_ptr,
    out_ptr,
    N,
    HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_WIDTHS: tl.constexpr,
    VALUE_WIDTHS: tl.constexpr,
    SCALE: tl.constexpr,
    DENSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """dq, dk and dv of a tile of tokens: first as queries of all keys, then as keys of all queries."""
    WIDTH: tl.constexpr = 2 * KEY_DIM + VALUE_DIM
    STRIDE: tl.constexpr = HEADS * WIDTH
    i_t = tl.program_id(0) % tl.cdiv(N, BLOCK_M)
    i_bh = tl.program_id(0) // tl.cdiv(N, BLOCK_M)
    i_h = i_bh % HEADS
    image = (i_bh // HEADS).to(tl.int64) * N
    t = i_t * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = t < N
    p_head = qkv_ptr + image * STRIDE + i_h * WIDTH
    p_grad = grad_ptr + image * (HEADS * VALUE_DIM) + i_h * VALUE_DIM
    p_out = out_ptr + image * STRIDE + i_h * WIDTH
    p_bias = bias_ptr + i_h.to(tl.int64) * N * N
    p_row = row_ptr + i_bh.to(tl.int64) * 3 * N

    b_q = load_pieces(p_head, t, inside, STRIDE, KEY_DIM, KEY_WIDTHS, DENSE)
    b_grad = load_pieces(p_grad, t, inside, HEADS * VALUE_DIM, VALUE_DIM, VALUE_WIDTHS, DENSE)
    p_line = p_bias + _times(t, N, DENSE)[:, None]
    b_dq = zero_pieces(KEY_WIDTHS, BLOCK_M)
    for first in tl.range(0, N, BLOCK_M, num_stages=NUM_STAGES):
        n = first + tl.arange(0, BLOCK_M)
        b_v = load_pieces(p_head + 2 * KEY_DIM, n, n < N, STRIDE, VALUE_DIM, VALUE_WIDTHS, DENSE)
        _, b_ds = _of_scores(
            b_q, b_grad, b_v, p_head, p_line, p_row, t, n, N,
            KEY_DIM, KEY_WIDTHS, VALUE_WIDTHS, STRIDE, SCALE, DENSE, PRECISION,
        )  # fmt: skip
        b_k = load_pieces(p_head + KEY_DIM, n, n < N, STRIDE, KEY_DIM, KEY_WIDTHS, DENSE)
        b_dq = add_products(b_dq, b_ds, b_k, KEY_WIDTHS, PRECISION)
    store_pieces(p_out, b_dq, SCALE, t, inside, STRIDE, KEY_DIM, KEY_WIDTHS, DENSE)

    b_v = load_pieces(p_head + 2 * KEY_DIM, t, inside, STRIDE, VALUE_DIM, VALUE_WIDTHS, DENSE)
    b_dk = zero_pieces(KEY_WIDTHS, BLOCK_M)
    b_dv = zero_pieces(VALUE_WIDTHS, BLOCK_M)
    for first in tl.range(0, N, BLOCK_M, num_stages=NUM_STAGES):
        m = first + tl.arange(0, BLOCK_M)
        b_q = load_pieces(p_head, m, m < N, STRIDE, KEY_DIM, KEY_WIDTHS, DENSE)
        b_grad = load_pieces(p_grad, m, m < N, HEADS * VALUE_DIM, VALUE_DIM, VALUE_WIDTHS, DENSE)
        b_p, b_ds = _of_scores(
            b_q, b_grad, b_v, p_head, p_bias + _times(m, N, DENSE)[:, None], p_row, m, t, N,
            KEY_DIM, KEY_WIDTHS, VALUE_WIDTHS, STRIDE, SCALE, DENSE, PRECISION,
        )  # fmt: skip
        b_dv = add_products(b_dv, b_p.T, b_grad, VALUE_WIDTHS, PRECISION)
        b_dk = add_products(b_dk, b_ds.T, b_q, KEY_WIDTHS, PRECISION)
    store_pieces(p_out + KEY_DIM, b_dk, SCALE, t, inside, STRIDE, KEY_DIM, KEY_WIDTHS, DENSE)
    store_pieces(p_out + 2 * KEY_DIM, b_dv, 1.0, t, inside, STRIDE, VALUE_DIM, VALUE_WIDTHS, DENSE)


@kernel
def attention_bias_backward_kernel(
    qkv_ptr,
    bias_ptr,
    grad_ptr,
    row_ptr,
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
    DENSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """A tile of ds, summed over every splits-th image, [splits, heads, N, N]."""
    WIDTH: tl.constexpr = 2 * KEY_DIM + VALUE_DIM
    STRIDE: tl.constexpr = HEADS * WIDTH
    tiles = tl.cdiv(N, BLOCK_M)
    i_n = tl.program_id(0) % tiles
    i_m = tl.program_id(0) // tiles % tiles
    i_sh = tl.program_id(0) // tiles // tiles
    i_h = i_sh % HEADS
    m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = i_n * BLOCK_M + tl.arange(0, BLOCK_M)
    p_bias = bias_ptr + i_h.to(tl.int64) * N * N + _times(m, N, DENSE)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    zero = tl.zeros((), tl.int64)
    for b in tl.range(i_sh // HEADS, batch, splits, num_stages=NUM_STAGES):
        image = (zero + b) * N
        p_head = qkv_ptr + image * STRIDE + i_h * WIDTH
        p_grad = grad_ptr + image * (HEADS * VALUE_DIM) + i_h * VALUE_DIM
        b_q = load_pieces(p_head, m, m < N, STRIDE, KEY_DIM, KEY_WIDTHS, DENSE)
        b_v = load_pieces(p_head + 2 * KEY_DIM, n, n < N, STRIDE, VALUE_DIM, VALUE_WIDTHS, DENSE)
        b_grad = load_pieces(p_grad, m, m < N, HEADS * VALUE_DIM, VALUE_DIM, VALUE_WIDTHS, DENSE)
        _, b_ds = _of_scores(
            b_q, b_grad, b_v, p_head, p_bias, row_ptr + (image * HEADS + i_h * N) * 3, m, n, N,
            KEY_DIM, KEY_WIDTHS, VALUE_WIDTHS, STRIDE, SCALE, DENSE, PRECISION,
        )  # fmt: skip
        total += b_ds
    p_total = out_bias_ptr + i_sh.to(tl.int64) * N * N + _times(m, N, DENSE)[:, None] + n[None, :]
    tl.store(p_total, total, mask=(m < N)[:, None] & (n < N)[None, :])
