"""A whole 4D MetaBlock in eval mode: pooling token mixer, then MLP; paper section 4, MB4D.

One kernel while a row's channels fit on chip: the hidden activations never reach memory. Without POOL it is the MLP
alone (`conv_mlp.py`). Wider rows take pooling and two matrix products (`linear.py`); few rows share their hidden
channels out (`split_mlp.py`): all behind the same operator.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor

from .activation import form, gain
from .launch import Launch, dot_precision, kernel
from .layout import Mlp, filled_map, map_rows, new_map, packed
from .linear import mlp_products
from .mlp_loop import add_hidden
from .pool_mixer import pool_mixer_launch
from .register import register
from .rows import channel_mask, channels_of, load_vector, locate, pool_tile, row_offsets, split, width
from .split_mlp import check_deterministic, split_mlp_launches
from .tiling.choose import Question, mlp_config
from .tiling.device import device_of
from .tiling.table import MlpConfig, SplitConfig


@kernel
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

    b_acc = add_hidden(
        b_y,
        b_acc,
        0,
        HIDDEN,
        weight1_ptr,
        scale1_ptr,
        shift1_ptr,
        weight2_ptr,
        C,
        HIDDEN,
        WIDTHS,
        True,
        ACTIVATION,
        PRECISION,
        BLOCK_H,
        NUM_STAGES,
    )

    if POOL and RELOAD:
        tl.debug_barrier()  # other threads of this program stored the residual
    for i in tl.static_range(len(WIDTHS)):
        c = channels_of(WIDTHS, i)
        mask = channel_mask(c, C, WIDTHS, i)
        p_out = out_ptr + o_out[:, None] + c[None, :]
        if POOL and RELOAD:
            # Rows beyond the end stand on the last one, which other threads may have overwritten by now.
            residual = tl.load(p_out, mask=inside[:, None] & mask, other=0.0)
        elif RELOAD:
            residual = tl.load(x_ptr + o_x[:, None] + c[None, :], mask=mask, other=0.0)
        else:
            residual = b_y[i]
        scale2 = load_vector(scale2_ptr, c, C, WIDTHS, i) * (1.0 / gain(ACTIVATION))
        result = residual.to(tl.float32) + (b_acc[i] * scale2 + load_vector(shift2_ptr, c, C, WIDTHS, i))
        tl.store(p_out, result.to(out_ptr.dtype.element_ty), mask=inside[:, None] & mask)


def map_mlp_launches(operation: str, x: Tensor, layer_scale: Tensor | None, mlp: Mlp, out: Tensor) -> list[Launch]:
    """The launches of "meta4d" or, without a layer scale, of "conv_mlp", as the table has it.

    One launch, two with the hidden split over programs, or products with the hidden in memory, pooling before them.
    x and out [B, C, H, W], not the same memory, of any strides but with channels next to each other (`dense_map`).
    """
    check_deterministic(mlp.deterministic)
    rows, target = map_rows(x), map_rows(out)
    question = Question(operation, mlp.weight1.dtype, (rows.channels, rows.count))
    config = mlp_config(question, device_of(x.device))
    if isinstance(config, SplitConfig):
        return split_mlp_launches(rows, rows, layer_scale, mlp, target, question, config)
    if config is not None:
        return [mlp_launch(x, layer_scale, mlp, out, question, config)]
    if layer_scale is None:
        return mlp_products(rows, rows, mlp, target, convolutions=True)
    mixed = map_rows(new_map(x))
    products = mlp_products(mixed, mixed, mlp, target, convolutions=True)
    return [pool_mixer_launch(x, layer_scale, mixed.tensor), *products]


def mlp_launch(
    x: Tensor, layer_scale: Tensor | None, mlp: Mlp, out: Tensor, question: Question, config: MlpConfig
) -> Launch:
    """The fused kernel; with a `layer_scale` the pooling token mixer comes first."""
    source, target = map_rows(x), map_rows(out)
    dtype = mlp.weight1.dtype
    return Launch(
        mlp_kernel,
        -(-source.count // config.block_m),
        {
            **source.sizes,
            **source.pointer("x"),
            **target.pointer("out"),
            "layer_scale_ptr": layer_scale,
            "weight1_ptr": mlp.weight1,
            "scale1_ptr": mlp.scale1,
            "shift1_ptr": mlp.shift1,
            "weight2_ptr": mlp.weight2,
            "scale2_ptr": mlp.scale2,
            "shift2_ptr": mlp.shift2,
        },
        {
            "C": source.channels,
            "HIDDEN": mlp.weight1.shape[0],
            "WIDTHS": split(source.channels),
            "POOL": layer_scale is not None,
            "RELOAD": config.reload,
            "X_FLAT": source.flat,
            "OUT_FLAT": target.flat,
            "ACTIVATION": form(mlp.activation, dtype),
            "PRECISION": dot_precision(dtype, convolution=True),
            "BLOCK_M": config.block_m,
            "BLOCK_H": config.block_h,
            "NUM_STAGES": config.num_stages,
        },
        question,
        config.num_warps,
        config.num_stages,
    )


def meta4d_launches(x: Tensor, layer_scale1: Tensor, *mlp: Any, out: Tensor) -> list[Launch]:
    """The block's launches; `mlp` are the fields of `Mlp`."""
    return map_mlp_launches("meta4d", x, layer_scale1, Mlp(*mlp), out)


def _implementation(x: Tensor, *arguments: Any) -> Tensor:
    return filled_map(x, lambda source, out: meta4d_launches(source, *packed(*arguments), out=out))


meta4d = register(
    "meta4d(Tensor x, Tensor layer_scale1, Tensor weight1, Tensor scale1, Tensor shift1, Tensor weight2, "
    "Tensor scale2, Tensor shift2, str activation, bool deterministic=True) -> Tensor",
    _implementation,
    new_map,
)
