"""Matrix product of rows with a weight, with its epilogue: out = residual + act(scale * (weight · x) + shift).

No operator of its own: a step of the MLPs that are too wide for one kernel, and of attention.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from .activation import activate, form, gain
from .launch import Launch, dot_precision, float32_products, kernel
from .layout import Mlp, Rows, new_rows
from .products import add_product
from .rows import locate, row_offsets, start, width
from .tiling.choose import Question, linear_config
from .tiling.device import device_of


@kernel
def linear_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    out_ptr,
    rows,
    H,
    W,
    stride_xb,
    stride_xh,
    stride_xw,
    stride_rb,
    stride_rh,
    stride_rw,
    stride_ob,
    stride_oh,
    stride_ow,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    X_FLAT: tl.constexpr,
    RESIDUAL_FLAT: tl.constexpr,
    OUT_FLAT: tl.constexpr,
    X_GAIN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # The column tiles of one row tile run side by side: its rows come from memory once, then from L2.
    i_n = tl.program_id(0) % tl.cdiv(OUTPUTS, BLOCK_N)
    i_m = tl.program_id(0) // tl.cdiv(OUTPUTS, BLOCK_N)
    row, b, h, w, inside = locate(i_m, rows, H, W, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    o_x = row_offsets(row, b, h, w, stride_xb, stride_xh, stride_xw, X_FLAT)
    p_x = x_ptr + o_x[:, None] + k[None, :]

    b_acc = ()
    for i in tl.static_range(len(WIDTHS)):
        b_acc = b_acc + (tl.zeros((BLOCK_M, width(WIDTHS, i)), tl.float32),)
    for first in tl.range(0, INPUTS, BLOCK_K, num_stages=NUM_STAGES):
        if INPUTS % BLOCK_K == 0:
            b_x = tl.load(p_x, mask=inside[:, None], other=0.0)
        else:
            b_x = tl.load(p_x, mask=inside[:, None] & (first + k < INPUTS)[None, :], other=0.0)
        b_next = ()
        for i in tl.static_range(len(WIDTHS)):
            n = i_n * BLOCK_N + start(WIDTHS, i) + tl.arange(0, width(WIDTHS, i))
            p_weight = weight_ptr + n[None, :] * INPUTS + (first + k)[:, None]
            if INPUTS % BLOCK_K == 0 and OUTPUTS % BLOCK_N == 0:
                b_weight = tl.load(p_weight)
            else:
                b_weight = tl.load(p_weight, mask=(n < OUTPUTS)[None, :] & (first + k < INPUTS)[:, None], other=0.0)
            b_next = b_next + (add_product(b_acc[i], b_x.to(b_weight.dtype), b_weight, PRECISION),)
        b_acc = b_next
        p_x += BLOCK_K

    o_out = row_offsets(row, b, h, w, stride_ob, stride_oh, stride_ow, OUT_FLAT)
    if HAS_RESIDUAL:
        o_residual = row_offsets(row, b, h, w, stride_rb, stride_rh, stride_rw, RESIDUAL_FLAT)
    for i in tl.static_range(len(WIDTHS)):
        n = i_n * BLOCK_N + start(WIDTHS, i) + tl.arange(0, width(WIDTHS, i))
        there = n < OUTPUTS
        shift = tl.load(shift_ptr + n, mask=there, other=0.0)[None, :]
        if HAS_SCALE:
            scale = tl.load(scale_ptr + n, mask=there, other=0.0)[None, :] * (1.0 / X_GAIN)
            value = b_acc[i] * scale + shift
        else:
            value = b_acc[i] + shift
        value = activate(value, ACTIVATION)
        mask = inside[:, None]
        if OUTPUTS % BLOCK_N != 0:
            mask = mask & there[None, :]
        if HAS_RESIDUAL:
            p_residual = residual_ptr + o_residual[:, None] + n[None, :]
            value = tl.load(p_residual, mask=mask, other=0.0).to(tl.float32) + value
        p_out = out_ptr + o_out[:, None] + n[None, :]
        tl.store(p_out, value.to(out_ptr.dtype.element_ty), mask=mask)


def linear_launch(
    x: Rows,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    out: Rows,
    *,
    residual: Rows | None = None,
    activation: str | None = None,
    x_gain: float = 1.0,
    convolution: bool = False,
) -> Launch:
    """out = residual + act(scale / x_gain * (weight · x) + shift) for each row; x, out, residual over the same images.

    weight [outputs, inputs] contiguous, its dtype being the product's; scale and shift [outputs] float32.
    `x_gain` is what x was multiplied by on the way; it needs a scale. `convolution`: the product stands for a 1x1
    convolution.
    """
    assert scale is not None or x_gain == 1
    outputs, inputs = weight.shape
    question = Question("linear", weight.dtype, (outputs, inputs, x.count))
    device = device_of(weight.device)
    config = linear_config(question, device)
    block_n = sum(config.widths)
    kept = residual or out  # strides are needed, also where no residual is read
    return Launch(
        linear_kernel,
        -(-x.count // config.block_m) * -(-outputs // block_n),
        {
            **x.sizes,
            **x.pointer("x"),
            **out.pointer("out"),
            **kept.pointer("residual"),
            "weight_ptr": weight,
            "scale_ptr": scale,
            "shift_ptr": shift,
            "residual_ptr": residual.tensor if residual else None,
        },
        {
            "INPUTS": inputs,
            "OUTPUTS": outputs,
            "HAS_SCALE": scale is not None,
            "HAS_RESIDUAL": residual is not None,
            "X_FLAT": x.flat,
            "RESIDUAL_FLAT": kept.flat,
            "OUT_FLAT": out.flat,
            "X_GAIN": x_gain,
            "ACTIVATION": form(activation, weight.dtype) if activation else "none",
            "PRECISION": dot_precision(weight.dtype, convolution=convolution, exact=float32_products(device)),
            "BLOCK_M": config.block_m,
            "WIDTHS": config.widths,
            "BLOCK_N": block_n,
            "BLOCK_K": config.block_k,
            "NUM_STAGES": config.num_stages,
        },
        question,
        config.num_warps,
        config.num_stages,
    )


def mlp_products(x: Rows, residual: Rows, mlp: Mlp, out: Rows, *, convolutions: bool = False) -> list[Launch]:
    """residual + scale2 * (weight2 · act(scale1 * (weight1 · x) + shift1)) + shift2, the hidden rows in memory."""
    dtype = mlp.weight1.dtype
    hidden = new_rows(x, mlp.weight1.shape[0], dtype)
    x_gain = gain(form(mlp.activation, dtype))
    return [
        linear_launch(
            x, mlp.weight1, mlp.scale1, mlp.shift1, hidden, activation=mlp.activation, convolution=convolutions
        ),
        linear_launch(
            hidden, mlp.weight2, mlp.scale2, mlp.shift2, out, residual=residual, x_gain=x_gain, convolution=convolutions
        ),
    ]
