"""MLP on tokens with its norm and residual: x + scale2 * (W2 · act(W1 · norm(x) + shift1)) + shift2; MB3D."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .launch import Launch, run
from .layer_norm import layer_norm_launch
from .layout import dense_tokens, new_tokens, packed, token_rows
from .library import register
from .linear import mlp_products


def linear_mlp_launches(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    activation: str,
    eps: float,
    *,
    out: Tensor,
) -> list[Launch]:
    """Norm and two products; what lies between them has the weights' dtype."""
    rows = token_rows(x)
    normed = token_rows(new_tokens(x, x.shape[2], weight1.dtype))
    return [
        layer_norm_launch(rows, norm_weight, norm_bias, eps, normed),
        *mlp_products(normed, rows, weight1, None, shift1, weight2, scale2, shift2, activation, token_rows(out)),
    ]


def _implementation(x: Tensor, *arguments: Any) -> Tensor:
    out = new_tokens(x, x.shape[2])
    run(*linear_mlp_launches(dense_tokens(x), *packed(*arguments), out=out))
    return out


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    return new_tokens(x, x.shape[2])


linear_mlp = register(
    "linear_mlp(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight1, Tensor shift1, Tensor weight2, "
    "Tensor scale2, Tensor shift2, str activation, float eps) -> Tensor",
    _implementation,
    _fake,
)
