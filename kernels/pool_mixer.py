"""Pooling token mixer with its residual: x + layer_scale * (avg_pool3x3(x) - x); paper section 4, MB4D."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from .launch import Launch, kernel, run
from .layout import map_rows, new_map
from .register import register
from .rows import locate, pool_tile, row_offsets
from .tiling.choose import Question, pool_config
from .tiling.device import device_of


@kernel
def pool_mixer_kernel(
    x_ptr,
    layer_scale_ptr,
    out_ptr,
    rows,
    H,
    W,
    stride_xb,
    stride_xh,
    stride_xw,
    stride_xc,
    stride_ob,
    stride_oh,
    stride_ow,
    stride_oc,
    C: tl.constexpr,
    X_FLAT: tl.constexpr,
    OUT_FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_c = tl.program_id(0) % tl.cdiv(C, BLOCK_C)
    i_m = tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    row, b, h, w, inside = locate(i_m, rows, H, W, BLOCK_M)
    c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = inside[:, None]
    if C % BLOCK_C != 0:
        mask = mask & (c < C)[None, :]
    o_x = row_offsets(row, b, h, w, stride_xb, stride_xh, stride_xw, X_FLAT)
    o_out = row_offsets(row, b, h, w, stride_ob, stride_oh, stride_ow, OUT_FLAT)
    p_x = x_ptr + o_x[:, None] + (c.to(tl.int64) * stride_xc)[None, :]
    p_out = out_ptr + o_out[:, None] + (c.to(tl.int64) * stride_oc)[None, :]
    layer_scale = tl.load(layer_scale_ptr + c, mask=c < C, other=0.0)[None, :]
    tl.store(p_out, pool_tile(p_x, mask, h, w, H, W, stride_xh, stride_xw, layer_scale), mask=mask)


def pool_mixer_launch(x: Tensor, layer_scale: Tensor, out: Tensor) -> Launch:
    """x and out [B, C, H, W] of any strides, layer_scale [C] float32."""
    source, target = map_rows(x), map_rows(out)
    question = Question("pool_mixer", x.dtype, (source.channels, int(x.stride(1) == 1), source.count))
    block_m, block_c, num_warps = pool_config(question, device_of(x.device))
    return Launch(
        pool_mixer_kernel,
        -(-source.count // block_m) * -(-source.channels // block_c),
        {
            **source.sizes,
            **source.pointer("x"),
            **target.pointer("out"),
            "layer_scale_ptr": layer_scale.contiguous(),
            "stride_xc": x.stride(1),
            "stride_oc": out.stride(1),
        },
        {
            "C": source.channels,
            "X_FLAT": source.flat,
            "OUT_FLAT": target.flat,
            "BLOCK_M": block_m,
            "BLOCK_C": block_c,
        },
        question,
        num_warps,
    )


def _implementation(x: Tensor, layer_scale: Tensor) -> Tensor:
    out = new_map(x)
    run(pool_mixer_launch(x, layer_scale, out))
    return out


pool_mixer = register("pool_mixer(Tensor x, Tensor layer_scale) -> Tensor", _implementation, new_map)
