"""Gradients of a 4D MetaBlock with frozen statistics, and of its MLP alone; the forward keeps x, and no other map.

The pooled map is computed anew, then the MLP's gradients (`mlp_backward.py`), then those of the pooling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import run
from .layout import dense_map, new_map, packed
from .mlp_backward import BackwardMlp, Wanted, mlp_sums
from .pool_mixer import pool_mixer_launch
from .pool_mixer_backward import pool_mixer_gradients
from .register import register_gradients
from .vendor import flat_map, row_products, scaled


def _implementation(
    grad: Tensor,
    x: Tensor,
    layer_scale1: Tensor | None,
    weight1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    activation: str,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    of_x, of_layer_scale, *of_mlp = needed
    weight1, scale1, shift1, weight2, scale2 = packed(weight1, scale1, shift1, weight2, scale2)
    mlp = BackwardMlp(weight1, scale1, shift1, weight2, activation)
    grad, source = dense_map(grad), dense_map(x)
    mixed, layer_scale = source, None
    back = of_x or of_layer_scale
    if layer_scale1 is not None and (back or any(of_mlp[:-1])):
        layer_scale = layer_scale1.contiguous()
        mixed = new_map(source)
        if x.numel():
            run(pool_mixer_launch(source, layer_scale, mixed))
    dx, *found = _mlp_gradients(grad, mixed, mlp, scale2, [back, *of_mlp])
    of_scale = None
    if dx is not None:
        batch, channels, height, width = x.shape
        dx = dx.view(batch, height, width, channels).permute(0, 3, 1, 2)
        if layer_scale is not None:
            dx, of_scale = pool_mixer_gradients(dx, x, layer_scale, (of_x, of_layer_scale))
        elif new_map(x).stride() != dx.stride():
            dx = new_map(x).copy_(dx)
    return [dx, of_scale, *found]


def _mlp_gradients(
    grad: Tensor, x: Tensor, mlp: BackwardMlp, scale2: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Of x as rows [rows, C] in its dtype, weight1, scale1, shift1, weight2, scale2, shift2, where `needed`."""
    of_x, of_weight1, of_scale1, of_shift1, of_weight2, of_scale2, of_shift2 = needed
    rows, dtype = flat_map(grad), mlp.weight1.dtype
    shift2 = rows.sum(0, dtype=torch.float32) if of_shift2 else None
    if not any(needed[:-1]):
        return [None] * 6 + [shift2]
    given = dense_map(x.to(dtype))  # a cast may lay the channels of an expanded map apart
    above, size = scaled(grad.permute(0, 2, 3, 1), scale2, dtype)
    wanted = Wanted(of_x, of_weight1, of_scale1, of_shift1, of_weight2 or of_scale2)
    found = mlp_sums(given, above.permute(0, 3, 1, 2), rows.to(dtype), mlp, wanted)
    assert mlp.scale1 is not None
    dx = None if found.x is None else torch.addcmul(rows, found.x, size, out=rows.new_empty(rows.shape))
    return [
        dx,
        None if found.weight1 is None else found.weight1 * (size * mlp.scale1)[:, None],
        None if found.scale1 is None else found.scale1 * size,
        None if found.shift1 is None else found.shift1 * size,
        found.weight2 * scale2[:, None] if of_weight2 and found.weight2 is not None else None,
        row_products(found.weight2, mlp.weight2) if of_scale2 and found.weight2 is not None else None,
        shift2,
    ]


meta4d_backward = register_gradients(
    "meta4d_backward(Tensor grad, Tensor x, Tensor? layer_scale1, Tensor weight1, Tensor scale1, Tensor shift1, "
    "Tensor weight2, Tensor scale2, Tensor shift2, str activation, bool[] needed) -> Tensor[]",
    _implementation,
    new_map,
)
