"""MLP on tokens with its norm and residual: x + scale2 * (W2 · act(W1 · norm(x) + shift1)) + shift2; MB3D."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .launch import Launch, run
from .layer_norm import layer_norm_launch
from .layout import Mlp, dense_tokens, new_tokens, packed, token_rows
from .linear import mlp_products
from .register import register
from .split_mlp import check_deterministic, split_mlp_launches
from .tiling.choose import Question, mlp_config
from .tiling.device import device_of
from .tiling.table import SplitConfig


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
    deterministic: bool = True,
    *,
    out: Tensor,
) -> list[Launch]:
    """Norm, and two products or, with the hidden split over programs, parts and their sum.

    What lies between norm and products has the weights' dtype.
    """
    check_deterministic(deterministic)
    mlp = Mlp(weight1, None, shift1, weight2, scale2, shift2, activation, deterministic)
    rows, target = token_rows(x), token_rows(out)
    normed = token_rows(new_tokens(x, x.shape[2], weight1.dtype))
    norm = layer_norm_launch(rows, norm_weight, norm_bias, eps, normed)
    question = Question("linear_mlp", weight1.dtype, (rows.channels, rows.count))
    config = mlp_config(question, device_of(x.device))
    if isinstance(config, SplitConfig):
        return [norm, *split_mlp_launches(normed, rows, None, mlp, target, question, config)]
    return [norm, *mlp_products(normed, rows, mlp, target)]


def _implementation(x: Tensor, *arguments: Any) -> Tensor:
    out = new_tokens(x)
    run(*linear_mlp_launches(dense_tokens(x), *packed(*arguments), out=out))
    return out


linear_mlp = register(
    "linear_mlp(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight1, Tensor shift1, Tensor weight2, "
    "Tensor scale2, Tensor shift2, str activation, float eps, bool deterministic=True) -> Tensor",
    _implementation,
    new_tokens,
)
