"""The network's end: mean over the tokens of LayerNorm(x), and a linear layer on it.

For few images one kernel: a program takes one image and some of the classes, and computes the pooled features that it
needs by itself, so that the classes' weights are spread over the whole GPU. Every tile of classes reads all tokens
again; with many images that is most of what is read, and pooling and matrix product are two launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, kernel, run
from .layout import dense_tokens, packed, token_rows
from .linear import linear_launch
from .register import register
from .tiling.choose import Question, head_config, norm_config
from .tiling.device import device_of


@kernel
def head_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    eps,
    stride_xb,
    stride_xn,
    C: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    # The class tiles of one image run side by side: its tokens come from memory once, then from L2.
    i_n = tl.program_id(0) % tl.cdiv(CLASSES, BLOCK_N)
    i_b = (tl.program_id(0) // tl.cdiv(CLASSES, BLOCK_N)).to(tl.int64)
    n = i_n * BLOCK_N + tl.arange(0, BLOCK_W)
    b_weight = _class_rows(weight_ptr, n, C, CLASSES, BLOCK_C)  # loads while the tokens are pooled
    p_x = x_ptr + i_b * stride_xb
    b_pooled = _mean_of_tokens(p_x, norm_weight_ptr, norm_bias_ptr, tokens, eps, stride_xn, C, BLOCK_T, BLOCK_C)
    for i in tl.static_range(BLOCK_N // BLOCK_W):
        b_product = b_weight.to(tl.float32) * b_pooled[None, :]
        if (i + 1) * BLOCK_W < BLOCK_N:
            b_weight = _class_rows(weight_ptr, n + BLOCK_W, C, CLASSES, BLOCK_C)
        b_out = tl.sum(b_product, 1) + tl.load(bias_ptr + n, mask=n < CLASSES, other=0.0)
        tl.store(out_ptr + i_b * CLASSES + n, b_out.to(out_ptr.dtype.element_ty), mask=n < CLASSES)
        n += BLOCK_W


@kernel
def token_mean_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    out_ptr,
    tokens,
    eps,
    stride_xb,
    stride_xn,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    p_x = x_ptr + i_b * stride_xb
    b_pooled = _mean_of_tokens(p_x, norm_weight_ptr, norm_bias_ptr, tokens, eps, stride_xn, C, BLOCK_T, BLOCK_C)
    c = tl.arange(0, BLOCK_C)
    tl.store(out_ptr + i_b * C + c, b_pooled.to(out_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def _mean_of_tokens(
    p_x, norm_weight_ptr, norm_bias_ptr, tokens, eps, stride_xn,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean of LayerNorm over the tokens of the image at p_x, [BLOCK_C] in float32, zeros beyond C."""
    c = tl.arange(0, BLOCK_C)
    there = (c < C)[None, :]
    b_sum = tl.zeros((BLOCK_C,), tl.float32)
    for first in tl.range(0, tokens, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        inside = (t < tokens)[:, None]
        b_x = tl.load(p_x + (t.to(tl.int64) * stride_xn)[:, None] + c[None, :], mask=inside & there, other=0.0)
        b_x = b_x.to(tl.float32)
        centred = tl.where(there, b_x - (tl.sum(b_x, 1) * (1.0 / C))[:, None], 0.0)
        variance = tl.sum(centred * centred, 1) * (1.0 / C)
        # Every thread computes these for all its tokens, with the one-step approximation of PyTorch's own kernel.
        reciprocal = tl.where(t < tokens, tl.rsqrt(variance + eps), 0.0)
        b_sum += tl.sum(centred * reciprocal[:, None], 0)
    weight = tl.load(norm_weight_ptr + c, mask=c < C, other=0.0)
    return b_sum / tokens * weight + tl.load(norm_bias_ptr + c, mask=c < C, other=0.0)


@triton.jit
def _class_rows(weight_ptr, n, C: tl.constexpr, CLASSES: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows n of the weight, [BLOCK_W, BLOCK_C], zeros for what does not exist."""
    c = tl.arange(0, BLOCK_C)
    mask = (n < CLASSES)[:, None] & (c < C)[None, :]
    return tl.load(weight_ptr + n.to(tl.int64)[:, None] * C + c[None, :], mask=mask, other=0.0)


def head_launches(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    out: Tensor,
) -> list[Launch]:
    """One launch, or two with the pooled features in memory; x [B, N, C] with channels that lie together."""
    if weight is None or bias is None:
        return [_token_mean_launch(x, norm_weight, norm_bias, eps, out)]
    (batch, tokens, channels), classes = x.shape, weight.shape[0]
    question = Question("head", weight.dtype, (channels, classes, batch))
    tiles = head_config(question, device_of(x.device))
    if tiles is None:
        pooled = torch.empty((batch, channels), dtype=weight.dtype, device=x.device)
        product = linear_launch(token_rows(pooled[None]), weight, None, bias, token_rows(out[None]))
        return [_token_mean_launch(x, norm_weight, norm_bias, eps, pooled), product]
    launch = Launch(
        head_kernel,
        batch * -(-classes // tiles.block_n),
        {
            "x_ptr": x,
            "norm_weight_ptr": norm_weight,
            "norm_bias_ptr": norm_bias,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "out_ptr": out,
            "tokens": tokens,
            "eps": eps,
            "stride_xb": x.stride(0),
            "stride_xn": x.stride(1),
        },
        {
            "C": channels,
            "CLASSES": classes,
            "BLOCK_T": _fitting(tiles.block_t, tokens),
            "BLOCK_C": tiles.block_c,
            "BLOCK_N": tiles.block_n,
            "BLOCK_W": tiles.block_w,
        },
        question,
        tiles.num_warps,
    )
    return [launch]


def _token_mean_launch(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, out: Tensor) -> Launch:
    batch, tokens, channels = x.shape
    question = Question("token_mean", x.dtype, (channels, batch))
    block_t, block_c, num_warps = norm_config(question, device_of(x.device))
    return Launch(
        token_mean_kernel,
        batch,
        {
            "x_ptr": x,
            "norm_weight_ptr": norm_weight,
            "norm_bias_ptr": norm_bias,
            "out_ptr": out,
            "tokens": tokens,
            "eps": eps,
            "stride_xb": x.stride(0),
            "stride_xn": x.stride(1),
        },
        {"C": channels, "BLOCK_T": _fitting(block_t, tokens), "BLOCK_C": block_c},
        question,
        num_warps,
    )


def _fitting(block: int, size: int) -> int:
    """A tile's side, no larger than it needs for `size`."""
    return int(min(block, triton.next_power_of_2(max(size, 1))))


def new_logits(x: Tensor, weight: Tensor | None) -> Tensor:
    """An empty [B, classes], or [B, C] for the pooled features."""
    outputs = x.shape[2] if weight is None else weight.shape[0]
    return torch.empty((x.shape[0], outputs), dtype=x.dtype, device=x.device)


def _implementation(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    out = new_logits(x, weight)
    run(*head_launches(dense_tokens(x), *packed(norm_weight, norm_bias, weight, bias, eps), out=out))
    return out


head = register(
    "head(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    _implementation,
    lambda x, norm_weight, norm_bias, weight: new_logits(x, weight),
)
