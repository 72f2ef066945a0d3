"""Rows of queries, keys, values and their gradients as pieces of channels, and products of these."""

from __future__ import annotations

import triton
import triton.language as tl

from .bias_attention import _times
from .rows import channel_mask, channels_of, width


@triton.jit
def load_pieces(p_rows, r, there, stride, SIZE: tl.constexpr, WIDTHS: tl.constexpr, DENSE: tl.constexpr):
    """Channels of the rows r, in pieces [rows, width]; zeros for what does not exist."""
    pieces = ()
    for i in tl.static_range(len(WIDTHS)):
        c = channels_of(WIDTHS, i)
        p_piece = p_rows + _times(r, stride, DENSE)[:, None] + c[None, :]
        pieces = pieces + (tl.load(p_piece, mask=there[:, None] & channel_mask(c, SIZE, WIDTHS, i), other=0.0),)
    return pieces


@triton.jit
def store_pieces(
    p_rows, pieces, factor, r, there, stride, SIZE: tl.constexpr, WIDTHS: tl.constexpr, DENSE: tl.constexpr
):  # fmt: skip
    for i in tl.static_range(len(WIDTHS)):
        c = channels_of(WIDTHS, i)
        p_piece = p_rows + _times(r, stride, DENSE)[:, None] + c[None, :]
        mask = there[:, None] & channel_mask(c, SIZE, WIDTHS, i)
        tl.store(p_piece, (pieces[i] * factor).to(p_rows.dtype.element_ty), mask=mask)


@triton.jit
def zero_pieces(WIDTHS: tl.constexpr, BLOCK: tl.constexpr):
    pieces = ()
    for i in tl.static_range(len(WIDTHS)):
        pieces = pieces + (tl.zeros((BLOCK, width(WIDTHS, i)), tl.float32),)
    return pieces


@triton.jit
def add_products(sums, left, right, WIDTHS: tl.constexpr, PRECISION: tl.constexpr):
    """sums + left · right, piece by piece."""
    pieces = ()
    for i in tl.static_range(len(WIDTHS)):
        pieces = pieces + (tl.dot(left.to(right[i].dtype), right[i], sums[i], input_precision=PRECISION),)
    return pieces


@triton.jit
def of_probabilities(b_grad, b_v, WIDTHS: tl.constexpr, PRECISION: tl.constexpr):
    """dP = D · vᵀ."""
    b_dp = tl.dot(b_grad[0], b_v[0].T, input_precision=PRECISION)
    for i in tl.static_range(1, len(WIDTHS)):
        b_dp = tl.dot(b_grad[i], b_v[i].T, b_dp, input_precision=PRECISION)
    return b_dp
