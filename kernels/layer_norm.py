"""LayerNorm over the channels of tokens, statistics in float32. No operator of its own: a step of the token blocks."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from .launch import Launch, kernel
from .layout import Rows
from .rows import locate, row_offsets
from .tiling.choose import Question, norm_config
from .tiling.device import device_of


@kernel
def layer_norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    H,
    W,
    eps,
    stride_xb,
    stride_xh,
    stride_xw,
    stride_ob,
    stride_oh,
    stride_ow,
    C: tl.constexpr,
    X_FLAT: tl.constexpr,
    OUT_FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_m = tl.program_id(0)
    row, b, h, w, inside = locate(i_m, rows, H, W, BLOCK_M)
    o_x = row_offsets(row, b, h, w, stride_xb, stride_xh, stride_xw, X_FLAT)
    o_out = row_offsets(row, b, h, w, stride_ob, stride_oh, stride_ow, OUT_FLAT)
    c = tl.arange(0, BLOCK_C)
    there = (c < C)[None, :]
    mask = inside[:, None] & there
    b_x = tl.load(x_ptr + o_x[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(there, b_x - (tl.sum(b_x, 1) / C)[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / C
    normalised = centred * (1.0 / tl.sqrt_rn(variance + eps))[:, None]
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0)[None, :]
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0)[None, :]
    p_out = out_ptr + o_out[:, None] + c[None, :]
    tl.store(p_out, (normalised * weight + bias).to(out_ptr.dtype.element_ty), mask=mask)


def layer_norm_launch(x: Rows, weight: Tensor, bias: Tensor, eps: float, out: Rows) -> Launch:
    """weight and bias [C] float32; out in the dtype of the product that follows."""
    question = Question("layer_norm", x.tensor.dtype, (x.channels, x.count))
    block_m, block_c, num_warps = norm_config(question, device_of(x.tensor.device))
    return Launch(
        layer_norm_kernel,
        -(-x.count // block_m),
        {
            **x.sizes,
            **x.pointer("x"),
            **out.pointer("out"),
            "weight_ptr": weight,
            "bias_ptr": bias,
            "eps": eps,
        },
        {
            "C": x.channels,
            "X_FLAT": x.flat,
            "OUT_FLAT": out.flat,
            "BLOCK_M": block_m,
            "BLOCK_C": block_c,
        },
        question,
        num_warps,
    )
