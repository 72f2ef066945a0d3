"""The MLP for few rows, its hidden channels split over programs: residual + scale2 * (W2 · act(W1 · y)) + shift2.

One image has 196 pixels at stage 3 and 49 at stage 4: a tile or two, each of which would walk over all hidden channels
alone while the rest of the GPU waits. Here a program takes some rows and some hidden channels and writes its part of
the sum, in float32; a second, small launch adds the parts, in the same order each time, and does the rest. Pooling,
where it comes first, is repeated by every program: its pixels come from L2.

No operator of its own: a form of `meta4d`, `conv_mlp` and `linear_mlp`.
"""

from __future__ import annotations

import warnings

import torch
import triton.language as tl
from torch import Tensor

from .activation import form, gain
from .launch import Launch, dot_precision, kernel
from .layout import Mlp, Rows
from .mlp_loop import add_hidden
from .rows import channel_mask, channels_of, load_vector, locate, pool_tile, row_offsets, split, width
from .tiling.choose import Question, pool_config
from .tiling.device import device_of
from .tiling.table import SplitConfig


@kernel
def split_mlp_kernel(
    x_ptr,
    layer_scale_ptr,
    weight1_ptr,
    scale1_ptr,
    shift1_ptr,
    weight2_ptr,
    out_ptr,
    rows,
    H,
    W,
    stride_xb,
    stride_xh,
    stride_xw,
    stride_os,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDTHS: tl.constexpr,
    POOL: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ATOMIC: tl.constexpr,
    X_FLAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    i_s = tl.program_id(0) % SPLITS
    i_m = tl.program_id(0) // SPLITS
    row, b, h, w, inside = locate(i_m, rows, H, W, BLOCK_M)
    o_x = row_offsets(row, b, h, w, stride_xb, stride_xh, stride_xw, X_FLAT)

    b_y = ()  # the MLP's input, [BLOCK_M, width] for each piece of the channels
    b_acc = ()
    for i in tl.static_range(len(WIDTHS)):
        c = channels_of(WIDTHS, i)
        mask = channel_mask(c, C, WIDTHS, i)
        p_x = x_ptr + o_x[:, None] + c[None, :]
        if POOL:
            layer_scale = load_vector(layer_scale_ptr, c, C, WIDTHS, i)
            y = pool_tile(p_x, mask, h, w, H, W, stride_xh, stride_xw, layer_scale)
        else:
            y = tl.load(p_x, mask=mask, other=0.0)
        b_y = b_y + (y,)
        b_acc = b_acc + (tl.zeros((BLOCK_M, width(WIDTHS, i)), tl.float32),)

    first = i_s * CHUNK
    b_acc = add_hidden(
        b_y,
        b_acc,
        first,
        tl.minimum(first + CHUNK, HIDDEN),
        weight1_ptr,
        scale1_ptr,
        shift1_ptr,
        weight2_ptr,
        C,
        HIDDEN,
        WIDTHS,
        HAS_SCALE,
        ACTIVATION,
        PRECISION,
        BLOCK_H,
        NUM_STAGES,
    )

    o_out = row.to(tl.int64) * C
    if not ATOMIC:
        o_out += i_s.to(tl.int64) * stride_os
    for i in tl.static_range(len(WIDTHS)):
        c = channels_of(WIDTHS, i)
        mask = inside[:, None] & channel_mask(c, C, WIDTHS, i)
        p_out = out_ptr + o_out[:, None] + c[None, :]
        if ATOMIC:
            tl.atomic_add(p_out, b_acc[i], mask=mask, sem="relaxed")
        else:
            tl.store(p_out, b_acc[i], mask=mask)


@kernel
def split_sum_kernel(
    parts_ptr,
    residual_ptr,
    layer_scale_ptr,
    scale2_ptr,
    shift2_ptr,
    out_ptr,
    rows,
    H,
    W,
    stride_ps,
    stride_rb,
    stride_rh,
    stride_rw,
    stride_ob,
    stride_oh,
    stride_ow,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    POOL: tl.constexpr,
    RESIDUAL_FLAT: tl.constexpr,
    OUT_FLAT: tl.constexpr,
    X_GAIN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_c = tl.program_id(0) % tl.cdiv(C, BLOCK_C)
    i_m = tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    row, b, h, w, inside = locate(i_m, rows, H, W, BLOCK_M)
    c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    there = (c < C)[None, :]
    mask = inside[:, None] & there

    p_parts = parts_ptr + (row.to(tl.int64) * C)[:, None] + c[None, :]
    b_sum = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for _ in tl.static_range(PARTS):
        b_sum += tl.load(p_parts, mask=mask, other=0.0)
        p_parts += stride_ps

    o_residual = row_offsets(row, b, h, w, stride_rb, stride_rh, stride_rw, RESIDUAL_FLAT)
    p_residual = residual_ptr + o_residual[:, None] + c[None, :]
    if POOL:
        layer_scale = tl.load(layer_scale_ptr + c, mask=c < C, other=0.0)[None, :]
        residual = pool_tile(p_residual, there, h, w, H, W, stride_rh, stride_rw, layer_scale)
    else:
        residual = tl.load(p_residual, mask=there, other=0.0)
    scale2 = tl.load(scale2_ptr + c, mask=c < C, other=0.0)[None, :] * (1.0 / X_GAIN)
    shift2 = tl.load(shift2_ptr + c, mask=c < C, other=0.0)[None, :]
    result = residual.to(tl.float32) + (b_sum * scale2 + shift2)
    o_out = row_offsets(row, b, h, w, stride_ob, stride_oh, stride_ow, OUT_FLAT)
    tl.store(out_ptr + o_out[:, None] + c[None, :], result.to(out_ptr.dtype.element_ty), mask=mask)


def split_mlp_launches(
    x: Rows,
    residual: Rows,
    layer_scale: Tensor | None,
    mlp: Mlp,
    out: Rows,
    question: Question,
    config: SplitConfig,
) -> list[Launch]:
    """The parts, and their sum; with a `layer_scale` the pooling token mixer comes first, and x is the residual.

    x, residual and out over the same images, out not in x's memory. If not deterministic, all programs add to one part,
    in any order: the first launch must find it at zero, as it is here and at each replay in a CUDA graph.
    """
    hidden, channels = mlp.weight1.shape
    dtype, device = mlp.weight1.dtype, mlp.weight1.device
    splits = -(-hidden // config.chunk)
    shape = (splits if mlp.deterministic else 1, x.count, channels)
    new = torch.empty if mlp.deterministic else torch.zeros
    parts = new(shape, dtype=torch.float32, device=device)
    activation = form(mlp.activation, dtype)
    split_launch = Launch(
        split_mlp_kernel,
        -(-x.count // config.block_m) * splits,
        {
            **x.sizes,
            **x.pointer("x"),
            "layer_scale_ptr": layer_scale,
            "weight1_ptr": mlp.weight1,
            "scale1_ptr": mlp.scale1,
            "shift1_ptr": mlp.shift1,
            "weight2_ptr": mlp.weight2,
            "out_ptr": parts,
            "stride_os": x.count * channels,
        },
        {
            "C": channels,
            "HIDDEN": hidden,
            "CHUNK": config.chunk,
            "SPLITS": splits,
            "WIDTHS": split(channels),
            "POOL": layer_scale is not None,
            "HAS_SCALE": mlp.scale1 is not None,
            "ATOMIC": not mlp.deterministic,
            "X_FLAT": x.flat,
            "ACTIVATION": activation,
            "PRECISION": dot_precision(dtype, convolution=question.operation != "linear_mlp"),
            "BLOCK_M": config.block_m,
            "BLOCK_H": config.block_h,
            "NUM_STAGES": config.num_stages,
        },
        question,
        config.num_warps,
        config.num_stages,
    )
    sum_question = Question("split_sum", out.tensor.dtype, (channels, x.count))
    block_m, block_c, num_warps = pool_config(sum_question, device_of(device))
    sum_launch = Launch(
        split_sum_kernel,
        -(-x.count // block_m) * -(-channels // block_c),
        {
            "parts_ptr": parts,
            **out.sizes,
            **residual.pointer("residual"),
            **out.pointer("out"),
            "layer_scale_ptr": layer_scale,
            "scale2_ptr": mlp.scale2,
            "shift2_ptr": mlp.shift2,
            "stride_ps": x.count * channels,
        },
        {
            "C": channels,
            "PARTS": len(parts),
            "POOL": layer_scale is not None,
            "RESIDUAL_FLAT": residual.flat,
            "OUT_FLAT": out.flat,
            "X_GAIN": gain(activation),
            "BLOCK_M": block_m,
            "BLOCK_C": block_c,
        },
        sum_question,
        num_warps,
    )
    return [split_launch, sum_launch]


def check_deterministic(deterministic: bool) -> None:
    """Raise or warn, as PyTorch does, where a setting forbids the requested order of additions.

    Raises:
        RuntimeError: without `deterministic` under `torch.use_deterministic_algorithms(True)`.
    """
    if deterministic or not torch.are_deterministic_algorithms_enabled():
        return
    message = "deterministic: got False, allowed under torch.use_deterministic_algorithms(True) is True"
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)
