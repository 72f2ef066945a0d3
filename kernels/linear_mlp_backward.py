"""Gradients of the MLP on tokens with its norm and residual; the forward keeps x, and no other tokens.

The normalised tokens are computed anew, then the MLP's gradients (`mlp_backward.py`), then those of the norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import run
from .layer_norm import layer_norm_launch
from .layer_norm_backward import layer_norm_gradients
from .layout import dense_tokens, new_tokens, packed, token_rows
from .mlp_backward import BackwardMlp, Wanted, mlp_sums
from .register import register_gradients
from .vendor import row_products, scaled


def _implementation(
    grad: Tensor,
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
    needed: Sequence[bool],
) -> list[Tensor | None]:
    of_x, of_norm_weight, of_norm_bias, of_weight1, of_shift1, of_weight2, of_scale2, of_shift2 = needed
    norm_weight, norm_bias, weight1, shift1, weight2, scale2 = packed(
        norm_weight, norm_bias, weight1, shift1, weight2, scale2
    )
    grad, source, dtype = dense_tokens(grad), dense_tokens(x), weight1.dtype
    rows = grad.reshape(-1, grad.shape[2])
    found: list[Tensor | None] = [None] * 8
    if of_shift2:
        found[7] = rows.sum(0, dtype=torch.float32)
    if any(needed[:7]):
        normed = new_tokens(x, dtype=dtype)
        if x.numel():
            run(layer_norm_launch(token_rows(source), norm_weight, norm_bias, eps, token_rows(normed)))
        above, size = scaled(grad, scale2, dtype)
        mlp = BackwardMlp(weight1, None, shift1, weight2, activation, convolution=False)
        back = of_x or of_norm_weight or of_norm_bias
        wanted = Wanted(back, of_weight1, False, of_shift1, of_weight2 or of_scale2)
        sums = mlp_sums(_as_map(normed), _as_map(above), rows.to(dtype), mlp, wanted)
        if sums.x is not None:
            found[:3] = layer_norm_gradients(
                sums.x.view(x.shape), source, grad, norm_weight, size, eps, (of_x, of_norm_weight, of_norm_bias)
            )
        found[3] = None if sums.weight1 is None else sums.weight1 * size
        found[4] = None if sums.shift1 is None else sums.shift1 * size
        if sums.weight2 is not None:
            found[5] = sums.weight2 * scale2[:, None] if of_weight2 else None
            found[6] = row_products(sums.weight2, weight2) if of_scale2 else None
    return found


def _as_map(x: Tensor) -> Tensor:
    """Tokens [B, N, C] as a map [B, C, 1, N] of one line."""
    return x.transpose(1, 2)[:, :, None]


linear_mlp_backward = register_gradients(
    "linear_mlp_backward(Tensor grad, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight1, Tensor shift1, "
    "Tensor weight2, Tensor scale2, Tensor shift2, str activation, float eps, bool[] needed) -> Tensor[]",
    _implementation,
    new_tokens,
)
