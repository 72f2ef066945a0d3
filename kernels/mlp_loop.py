"""The hidden channels of an MLP, a chunk at a time: the loop of the kernels that never store them."""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate
from .rows import channels_of, cut


@triton.jit
def add_hidden(
    b_y,
    b_acc,
    first,
    last,
    weight1_ptr,
    scale1_ptr,
    shift1_ptr,
    weight2_ptr,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTHS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """b_acc + W2 · act(scale1 * (W1 · y) + shift1), of the hidden channels from `first` up to `last`.

    b_y and b_acc: a tile for each piece of the channels, [rows, width]; b_acc and the result in float32.
    """
    for chunk in tl.range(first, last, BLOCK_H, num_stages=NUM_STAGES):
        n = chunk + tl.arange(0, BLOCK_H)
        b_hidden = tl.zeros((b_y[0].shape[0], BLOCK_H), tl.float32)
        for i in tl.static_range(len(WIDTHS)):
            c = channels_of(WIDTHS, i)
            b_w1 = _load_weight(
                weight1_ptr + n[None, :] * C + c[:, None], c[:, None], n[None, :], C, HIDDEN, WIDTHS, i, BLOCK_H
            )
            b_hidden = tl.dot(b_y[i].to(b_w1.dtype), b_w1, b_hidden, input_precision=PRECISION)
        if HAS_SCALE:
            b_hidden = b_hidden * _load_hidden(scale1_ptr, n, HIDDEN, BLOCK_H)
        b_hidden = b_hidden + _load_hidden(shift1_ptr, n, HIDDEN, BLOCK_H)
        b_act = activate(b_hidden, ACTIVATION).to(weight2_ptr.dtype.element_ty)
        b_next = ()
        for i in tl.static_range(len(WIDTHS)):
            c = channels_of(WIDTHS, i)
            b_w2 = _load_weight(
                weight2_ptr + c[None, :] * HIDDEN + n[:, None], c[None, :], n[:, None], C, HIDDEN, WIDTHS, i, BLOCK_H
            )
            b_next = b_next + (tl.dot(b_act, b_w2, b_acc[i], input_precision=PRECISION),)
        b_acc = b_next
    return b_acc


@triton.jit
def _load_hidden(ptr, n, HIDDEN: tl.constexpr, BLOCK_H: tl.constexpr):
    if HIDDEN % BLOCK_H == 0:
        value = tl.load(ptr + n)
    else:
        value = tl.load(ptr + n, mask=n < HIDDEN, other=0.0)
    return value[None, :]


@triton.jit
def _load_weight(
    ptrs, c, n, C: tl.constexpr, HIDDEN: tl.constexpr, WIDTHS: tl.constexpr, PIECE: tl.constexpr, BLOCK_H: tl.constexpr
):
    if HIDDEN % BLOCK_H != 0:
        weight = tl.load(ptrs, mask=(c < C) & (n < HIDDEN), other=0.0)
    elif cut(WIDTHS, PIECE, C):
        weight = tl.load(ptrs, mask=c < C, other=0.0)
    else:
        weight = tl.load(ptrs)
    return weight
