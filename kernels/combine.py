"""Passes over maps that a 4D block in training takes beside its products: pooling, sums over rows, a sum of two maps.

`keep` [B] holds stochastic depth's factor of each image.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from .launch import Launch, kernel, run
from .layout import Rows, map_rows
from .rows import locate, pool_tile, row_offsets
from .tiling.choose import Question, pool_config
from .tiling.device import device_of


@kernel
def combine_kernel(
    first_ptr,
    second_ptr,
    keep_ptr,
    terms_ptr,
    out_ptr,
    rows,
    H,
    W,
    stride_fb,
    stride_fh,
    stride_fw,
    stride_sb,
    stride_sh,
    stride_sw,
    C: tl.constexpr,
    FIRST_FLAT: tl.constexpr,
    SECOND_FLAT: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """keep * (a * first + b) + c * second + d, with the vectors a, b, c, d at `terms_ptr`, [4, C]; out [rows, C]."""
    i_c = tl.program_id(0) % tl.cdiv(C, BLOCK_C)
    i_m = tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    row, b, h, w, inside = locate(i_m, rows, H, W, BLOCK_M)
    c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = inside[:, None] & (c < C)[None, :]
    o_first = row_offsets(row, b, h, w, stride_fb, stride_fh, stride_fw, FIRST_FLAT)
    o_second = row_offsets(row, b, h, w, stride_sb, stride_sh, stride_sw, SECOND_FLAT)
    first = tl.load(first_ptr + o_first[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(second_ptr + o_second[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    p_terms = terms_ptr + c
    kept = first * tl.load(p_terms, mask=c < C, other=0.0)[None, :]
    kept += tl.load(p_terms + C, mask=c < C, other=0.0)[None, :]
    if KEEP:
        kept *= tl.load(keep_ptr + b)[:, None]
    result = kept + second * tl.load(p_terms + 2 * C, mask=c < C, other=0.0)[None, :]
    result += tl.load(p_terms + 3 * C, mask=c < C, other=0.0)[None, :]
    p_out = out_ptr + row.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(p_out, result.to(out_ptr.dtype.element_ty), mask=mask)


def combine(first: Tensor, second: Tensor, keep: Tensor | None, terms: Tensor, dtype: torch.dtype) -> Tensor:
    """keep * (a * first + b) + c * second + d in `dtype`, channels_last, for terms a, b, c, d: float32 [4, C].

    first and second [B, C, H, W], channels next to each other.
    """
    one, other = map_rows(first), map_rows(second)
    out = _new_rows(first, dtype)
    block_m, block_c, num_warps, question = _tiles(one)
    if first.numel():
        run(
            Launch(
                combine_kernel,
                -(-one.count // block_m) * -(-one.channels // block_c),
                {
                    **one.sizes,
                    **one.pointer("first"),
                    **other.pointer("second"),
                    "keep_ptr": keep,
                    "terms_ptr": terms,
                    "out_ptr": out,
                },
                {
                    "C": one.channels,
                    "FIRST_FLAT": one.flat,
                    "SECOND_FLAT": other.flat,
                    "KEEP": keep is not None,
                    "BLOCK_M": block_m,
                    "BLOCK_C": block_c,
                },
                question,
                num_warps,
            )
        )
    return out


@kernel
def gradient_sums_kernel(
    grad_ptr,
    x_ptr,
    keep_ptr,
    mean_ptr,
    out_sum_ptr,
    out_product_ptr,
    rows,
    H,
    W,
    stride_gb,
    stride_gh,
    stride_gw,
    stride_xb,
    stride_xh,
    stride_xw,
    C: tl.constexpr,
    GRAD_FLAT: tl.constexpr,
    X_FLAT: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over the rows of a tile: of keep * grad and of keep * grad * (x - mean), [tiles, C]."""
    i_c = tl.program_id(0) % tl.cdiv(C, BLOCK_C)
    i_m = tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    row, b, h, w, inside = locate(i_m, rows, H, W, BLOCK_M)
    c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = inside[:, None] & (c < C)[None, :]
    o_grad = row_offsets(row, b, h, w, stride_gb, stride_gh, stride_gw, GRAD_FLAT)
    o_x = row_offsets(row, b, h, w, stride_xb, stride_xh, stride_xw, X_FLAT)
    grad = tl.load(grad_ptr + o_grad[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + o_x[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    if KEEP:
        grad *= tl.load(keep_ptr + b)[:, None]
    mean = tl.load(mean_ptr + c, mask=c < C, other=0.0)[None, :]
    o_out = i_m.to(tl.int64) * C + c
    tl.store(out_sum_ptr + o_out, tl.sum(grad, 0), mask=c < C)
    tl.store(out_product_ptr + o_out, tl.sum(tl.where(mask, grad * (x - mean), 0.0), 0), mask=c < C)


def gradient_sums(grad: Tensor, x: Tensor, keep: Tensor | None, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Σ keep * grad and Σ keep * grad * (x - mean) over all rows, float32 [C].

    grad and x [B, C, H, W], channels next to each other; mean float32 [C].
    """
    above, other = map_rows(grad), map_rows(x)
    block_m, block_c, num_warps, question = _tiles(above)
    tiles = -(-above.count // block_m)
    sums, products = grad.new_empty(2, tiles, above.channels, dtype=torch.float32)
    run(
        Launch(
            gradient_sums_kernel,
            tiles * -(-above.channels // block_c),
            {
                **above.sizes,
                **above.pointer("grad"),
                **other.pointer("x"),
                "keep_ptr": keep,
                "mean_ptr": mean,
                "out_sum_ptr": sums,
                "out_product_ptr": products,
            },
            {
                "C": above.channels,
                "GRAD_FLAT": above.flat,
                "X_FLAT": other.flat,
                "KEEP": keep is not None,
                "BLOCK_M": block_m,
                "BLOCK_C": block_c,
            },
            question,
            num_warps,
        )
    )
    return sums.sum(0, dtype=torch.float64).float(), products.sum(0, dtype=torch.float64).float()


@kernel
def pool_keep_kernel(
    x_ptr,
    layer_scale_ptr,
    keep_ptr,
    out_ptr,
    rows,
    H,
    W,
    stride_xb,
    stride_xh,
    stride_xw,
    C: tl.constexpr,
    X_FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """x + keep * layer_scale * (avg_pool3x3(x) - x), out [rows, C]."""
    i_c = tl.program_id(0) % tl.cdiv(C, BLOCK_C)
    i_m = tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    row, b, h, w, inside = locate(i_m, rows, H, W, BLOCK_M)
    c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = inside[:, None] & (c < C)[None, :]
    p_x = x_ptr + row_offsets(row, b, h, w, stride_xb, stride_xh, stride_xw, X_FLAT)[:, None] + c[None, :]
    scale = tl.load(layer_scale_ptr + c, mask=c < C, other=0.0)[None, :] * tl.load(keep_ptr + b)[:, None]
    p_out = out_ptr + row.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(p_out, pool_tile(p_x, mask, h, w, H, W, stride_xh, stride_xw, scale), mask=mask)


def pool_keep(x: Tensor, layer_scale: Tensor, keep: Tensor) -> Tensor:
    """x + keep * layer_scale * (avg_pool3x3(x) - x), channels_last; x [B, C, H, W], channels next to each other."""
    source, out = map_rows(x), _new_rows(x, x.dtype)
    block_m, block_c, num_warps, question = _tiles(source)
    if x.numel():
        run(
            Launch(
                pool_keep_kernel,
                -(-source.count // block_m) * -(-source.channels // block_c),
                {
                    **source.sizes,
                    **source.pointer("x"),
                    "layer_scale_ptr": layer_scale,
                    "keep_ptr": keep,
                    "out_ptr": out,
                },
                {"C": source.channels, "X_FLAT": source.flat, "BLOCK_M": block_m, "BLOCK_C": block_c},
                question,
                num_warps,
            )
        )
    return out


def _new_rows(like: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty channels_last map, whatever the layout of `like`."""
    batch, channels, height, width = like.shape
    return torch.empty(batch, height, width, channels, dtype=dtype, device=like.device).permute(0, 3, 1, 2)


def _tiles(rows: Rows) -> tuple[int, int, int, Question]:
    question = Question("channel_sums", rows.tensor.dtype, (rows.channels, rows.count))
    return *pool_config(question, device_of(rows.tensor.device)), question
