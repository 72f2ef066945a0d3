"""Attention with its norm, projections and residual: x + scale * (proj · attention(qkv · norm(x))) + shift; MB3D.

Four launches behind one operator: a single kernel would read all weights once for each image.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .bias_attention import bias_attention_launch, new_values
from .launch import Launch, run
from .layer_norm import layer_norm_launch
from .layout import dense_tokens, new_tokens, packed, token_rows
from .linear import linear_launch
from .register import register


def attention_mixer_launches(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    bias: Tensor,
    proj_weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    num_heads: int,
    key_dim: int,
    eps: float,
    prepared: bool = False,
    *,
    out: Tensor,
) -> list[Launch]:
    """Norm, QKV, attention, projection. Results between them have the weights' dtype.

    `prepared`: the bias is what `prepare_bias` returned for that dtype.
    """
    rows = token_rows(x)
    normed = new_tokens(x, x.shape[2], qkv_weight.dtype)
    qkv = new_tokens(x, qkv_weight.shape[0], qkv_weight.dtype)
    values = new_values(qkv, num_heads, key_dim)
    return [
        layer_norm_launch(rows, norm_weight, norm_bias, eps, token_rows(normed)),
        linear_launch(token_rows(normed), qkv_weight, None, qkv_bias, token_rows(qkv)),
        bias_attention_launch(qkv, bias, num_heads, key_dim, values, prepared=prepared),
        linear_launch(token_rows(values), proj_weight, scale, shift, token_rows(out), residual=rows),
    ]


def _implementation(x: Tensor, *arguments: Any) -> Tensor:
    out = new_tokens(x)
    run(*attention_mixer_launches(dense_tokens(x), *packed(*arguments), out=out))
    return out


attention_mixer = register(
    "attention_mixer(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor qkv_weight, Tensor qkv_bias, Tensor bias, "
    "Tensor proj_weight, Tensor scale, Tensor shift, int num_heads, int key_dim, float eps, "
    "bool prepared=False) -> Tensor",
    _implementation,
    new_tokens,
)
