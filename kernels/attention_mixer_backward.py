"""Gradients of attention with its norm, projections and residual; the forward keeps x, and no other tokens.

The norm, the queries, keys and values, and, for the projection's weight, the attention are computed anew. The products
with weights are the vendor's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .bias_attention import bias_attention_launch, new_values
from .bias_attention_backward import attention_gradients
from .launch import run
from .layer_norm import layer_norm_launch
from .layer_norm_backward import layer_norm_gradients
from .layout import dense_tokens, new_tokens, packed, token_rows
from .linear import linear_launch
from .register import register_gradients
from .vendor import float32_product, row_products, scaled


def _implementation(
    grad: Tensor,
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
    needed: Sequence[bool],
) -> list[Tensor | None]:
    of_x, of_norm_weight, of_norm_bias, of_qkv, of_qkv_bias, of_bias, of_proj, of_scale, of_shift = needed
    norm_weight, norm_bias, qkv_weight, qkv_bias, bias, proj_weight, scale = packed(
        norm_weight, norm_bias, qkv_weight, qkv_bias, bias, proj_weight, scale
    )
    grad, source, dtype = dense_tokens(grad), dense_tokens(x), qkv_weight.dtype
    rows = grad.reshape(-1, grad.shape[2])
    found: list[Tensor | None] = [None] * 9
    if of_shift:
        found[8] = rows.sum(0, dtype=torch.float32)
    if not any(needed[:8]):
        return found

    normed, qkv = new_tokens(x, dtype=dtype), new_tokens(x, len(qkv_weight), dtype)
    values = new_values(qkv, num_heads, key_dim)
    launches = [
        layer_norm_launch(token_rows(source), norm_weight, norm_bias, eps, token_rows(normed)),
        linear_launch(token_rows(normed), qkv_weight, None, qkv_bias, token_rows(qkv)),
    ]
    if of_proj or of_scale:
        launches.append(bias_attention_launch(qkv, bias, num_heads, key_dim, values))
    if x.numel():
        run(*launches)
    if of_proj or of_scale:
        product = float32_product(rows.to(dtype).T, values.flatten(0, 1))
        found[6] = product * scale[:, None] if of_proj else None
        found[7] = row_products(product, proj_weight) if of_scale else None
    if any(needed[:6]):
        above, size = scaled(rows, scale, dtype)
        back = of_x or of_norm_weight or of_norm_bias
        of_tokens = back or of_qkv or of_qkv_bias
        of_values = torch.mm(above, proj_weight).view(values.shape)
        dqkv, dbias = attention_gradients(of_values, qkv, bias, num_heads, key_dim, (of_tokens, of_bias))
        found[5] = None if dbias is None else dbias * size
        if dqkv is not None:
            dqkv = dqkv.flatten(0, 1)
            found[3] = float32_product(dqkv.T, normed.flatten(0, 1)) * size if of_qkv else None
            found[4] = dqkv.sum(0, dtype=torch.float32) * size if of_qkv_bias else None
            if back:
                of_normed = torch.mm(dqkv, qkv_weight).view(x.shape)
                wanted = of_x, of_norm_weight, of_norm_bias
                found[:3] = layer_norm_gradients(of_normed, source, grad, norm_weight, size, eps, wanted)
    return found


attention_mixer_backward = register_gradients(
    "attention_mixer_backward(Tensor grad, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor qkv_weight, "
    "Tensor qkv_bias, Tensor bias, Tensor proj_weight, Tensor scale, Tensor shift, int num_heads, int key_dim, "
    "float eps, bool[] needed) -> Tensor[]",
    _implementation,
    new_tokens,
)
