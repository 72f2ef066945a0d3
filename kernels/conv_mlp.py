"""Fused MLP on maps: x + scale2 * (W2 · act(scale1 * (W1 · x) + shift1)) + shift2; paper section 4, MB4D.

One kernel while a row's channels fit on chip: the hidden activations never reach memory. With POOL it starts from
the pooling token mixer, which makes it the whole MetaBlock. Wider rows take two matrix products (`linear.py`).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .activation import activate, form, gain
from .config import mlp_config
from .device import device_of
from .launch import Launch, dot_precision
from .layout import filled_map, map_rows, new_map, packed
from .library import register
from .linear import mlp_products
from .table import MlpConfig
from .tiles import channel_mask, channels_of, cut, load_vector, locate, pool_tile, row_offsets, split, width


@triton.jit
def mlp_kernel(
    x_ptr,
    layer_scale_ptr,
    weight1_ptr,
    scale1_ptr,
    shift1_ptr,
    weight2_ptr,
    scale2_ptr,
    shift2_ptr,
    out_ptr,
    rows,
    H,
    W,
    stride_xb,
    stride_xh,
    stride_xw,
    stride_ob,
    stride_oh,
    stride_ow,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTHS: tl.constexpr,
    POOL: tl.constexpr,
    RELOAD: tl.constexpr,
    X_FLAT: tl.constexpr,
    OUT_FLAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    i_m = tl.program_id(0)
    row, b, h, w, inside = locate(i_m, rows, H, W, BLOCK_M)
    o_x = row_offsets(row, b, h, w, stride_xb, stride_xh, stride_xw, X_FLAT)
    o_out = row_offsets(row, b, h, w, stride_ob, stride_oh, stride_ow, OUT_FLAT)

    b_y = ()  # the MLP's input, [BLOCK_M, width] for each piece of the channels
    b_acc = ()
    for i in tl.static_range(len(WIDTHS)):
        c = channels_of(WIDTHS, i)
        mask = channel_mask(c, C, WIDTHS, i)
        p_x = x_ptr + o_x[:, None] + c[None, :]
        if POOL:
            layer_scale = load_vector(layer_scale_ptr, c, C, WIDTHS, i)
            y = pool_tile(p_x, mask, h, w, H, W, stride_xh, stride_xw, layer_scale)
            if RELOAD:
                p_out = out_ptr + o_out[:, None] + c[None, :]
                tl.store(p_out, y, mask=inside[:, None] & mask)
        else:
            y = tl.load(p_x, mask=mask, other=0.0)
        b_y = b_y + (y,)
        b_acc = b_acc + (tl.zeros((BLOCK_M, width(WIDTHS, i)), tl.float32),)

    for first in tl.range(0, HIDDEN, BLOCK_H, num_stages=NUM_STAGES):
        n = first + tl.arange(0, BLOCK_H)
        b_hidden = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        for i in tl.static_range(len(WIDTHS)):
            c = channels_of(WIDTHS, i)
            b_w1 = _load_weight(
                weight1_ptr + n[None, :] * C + c[:, None], c[:, None], n[None, :], C, HIDDEN, WIDTHS, i, BLOCK_H
            )
            b_hidden = tl.dot(b_y[i].to(b_w1.dtype), b_w1, b_hidden, input_precision=PRECISION)
        if HIDDEN % BLOCK_H == 0:
            scale1, shift1 = tl.load(scale1_ptr + n), tl.load(shift1_ptr + n)
        else:
            scale1 = tl.load(scale1_ptr + n, mask=n < HIDDEN, other=0.0)
            shift1 = tl.load(shift1_ptr + n, mask=n < HIDDEN, other=0.0)
        b_act = activate(b_hidden * scale1[None, :] + shift1[None, :], ACTIVATION).to(weight2_ptr.dtype.element_ty)
        b_next = ()
        for i in tl.static_range(len(WIDTHS)):
            c = channels_of(WIDTHS, i)
            b_w2 = _load_weight(
                weight2_ptr + c[None, :] * HIDDEN + n[:, None], c[None, :], n[:, None], C, HIDDEN, WIDTHS, i, BLOCK_H
            )
            b_next = b_next + (tl.dot(b_act, b_w2, b_acc[i], input_precision=PRECISION),)
        b_acc = b_next

    if POOL and RELOAD:
        tl.debug_barrier()  # the residual was stored by other threads of this program
    for i in tl.static_range(len(WIDTHS)):
        c = channels_of(WIDTHS, i)
        mask = channel_mask(c, C, WIDTHS, i)
        p_out = out_ptr + o_out[:, None] + c[None, :]
        if POOL and RELOAD:
            residual = tl.load(p_out, mask=mask, other=0.0)
        elif RELOAD:
            residual = tl.load(x_ptr + o_x[:, None] + c[None, :], mask=mask, other=0.0)
        else:
            residual = b_y[i]
        scale2 = load_vector(scale2_ptr, c, C, WIDTHS, i) * (1.0 / gain(ACTIVATION))
        result = residual.to(tl.float32) + (b_acc[i] * scale2 + load_vector(shift2_ptr, c, C, WIDTHS, i))
        tl.store(p_out, result.to(out_ptr.dtype.element_ty), mask=inside[:, None] & mask)


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


def mlp_launch(
    x: Tensor,
    layer_scale: Tensor | None,
    weight1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    activation: str,
    out: Tensor,
    config: MlpConfig,
) -> Launch:
    """The fused kernel; with a `layer_scale` the pooling token mixer comes first.

    x and out [B, C, H, W], not the same memory, of any strides but with channels next to each other (`dense_map`);
    weights [hidden, C] and [C, hidden], vectors [hidden] and [C], contiguous.
    """
    source, target = map_rows(x), map_rows(out)
    return Launch(
        mlp_kernel,
        -(-source.count // config.block_m),
        {
            "x_ptr": x,
            "layer_scale_ptr": layer_scale,
            "weight1_ptr": weight1,
            "scale1_ptr": scale1,
            "shift1_ptr": shift1,
            "weight2_ptr": weight2,
            "scale2_ptr": scale2,
            "shift2_ptr": shift2,
            "out_ptr": out,
            "rows": source.count,
            "H": source.height,
            "W": source.width,
            **source.strides("x"),
            **target.strides("o"),
        },
        {
            "C": source.channels,
            "HIDDEN": weight1.shape[0],
            "WIDTHS": split(source.channels),
            "POOL": layer_scale is not None,
            "RELOAD": config.reload,
            "X_FLAT": source.flat,
            "OUT_FLAT": target.flat,
            "ACTIVATION": form(activation, weight1.dtype),
            "PRECISION": dot_precision(weight1.dtype),
            "BLOCK_M": config.block_m,
            "BLOCK_H": config.block_h,
            "NUM_STAGES": config.num_stages,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def conv_mlp_launches(
    x: Tensor,
    weight1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    activation: str,
    *,
    out: Tensor,
) -> list[Launch]:
    """The MLP without pooling: one launch, or two with the hidden activations in memory."""
    rows = map_rows(x)
    config = mlp_config("conv_mlp", rows.channels, rows.count, weight1.dtype, device_of(x.device))
    if config is not None:
        return [mlp_launch(x, None, weight1, scale1, shift1, weight2, scale2, shift2, activation, out, config)]
    return mlp_products(rows, rows, weight1, scale1, shift1, weight2, scale2, shift2, activation, map_rows(out))


def _implementation(x: Tensor, *arguments: Any) -> Tensor:
    return filled_map(x, lambda source, out: conv_mlp_launches(source, *packed(*arguments), out=out))


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    return new_map(x)


conv_mlp = register(
    "conv_mlp(Tensor x, Tensor weight1, Tensor scale1, Tensor shift1, Tensor weight2, Tensor scale2, Tensor shift2, "
    "str activation) -> Tensor",
    _implementation,
    _fake,
)
