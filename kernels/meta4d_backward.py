"""Gradients of a 4D MetaBlock with frozen statistics, and of its MLP alone; the forward keeps x, and no other map.

The pooled map is computed anew, then the MLP's gradients (`mlp_backward.py`), then those of the pooling.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import run
from .layout import dense_map, new_map, packed
from .mlp_backward import BackwardMlp, Needed, mlp_gradients
from .pool_mixer import pool_mixer_launch
from .pool_mixer_backward import pool_mixer_gradients
from .register import register_gradients


def _implementation(
    grad: Tensor,
    x: Tensor,
    layer_scale1: Tensor | None,
    weight1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    activation: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    with _no_autocast(x.device):
        of_x, of_layer_scale, *of_mlp = needed
        weight1, scale1, shift1, weight2, scale2 = packed(weight1, scale1, shift1, weight2, scale2)
        mlp = BackwardMlp(weight1, scale1, shift1, weight2, scale2, activation)
        grad, source = dense_map(grad), dense_map(x)
        mixed, layer_scale = source, None
        if layer_scale1 is not None:
            layer_scale = layer_scale1.contiguous()
            mixed = new_map(source)
            if x.numel():
                run(pool_mixer_launch(source, layer_scale, mixed))
        found = mlp_gradients(grad, mixed, mlp, Needed(of_x or of_layer_scale, *of_mlp))
        dx, scale = found.x, None
        if dx is not None:
            batch, channels, height, width = x.shape
            dx = dx.view(batch, height, width, channels).permute(0, 3, 1, 2)
            if layer_scale is not None:
                dx, scale = pool_mixer_gradients(dx, x, layer_scale, (of_x, of_layer_scale))
            elif new_map(x).stride() != dx.stride():
                dx = new_map(x).copy_(dx)
        return [x.new_empty(0) if one is None else one for one in (dx, scale, *found[1:])]


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Without it the vendor's products would take autocast's dtype where a backward runs within autocast.

    As `effformer.backend.no_autocast`, which kernels do not import: they are also shipped without the package.
    """
    if device.type not in ("cuda", "cpu") or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _fake(
    grad: Tensor,
    x: Tensor,
    layer_scale1: Tensor | None,
    weight1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    activation: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    vectors = layer_scale1 if layer_scale1 is not None else scale2, weight1, scale1, shift1, weight2, scale2, scale2
    results = [new_map(x), *(x.new_empty(one.shape, dtype=torch.float32) for one in vectors)]
    return [one if wanted else x.new_empty(0) for one, wanted in zip(results, needed, strict=True)]


meta4d_backward = register_gradients(
    "meta4d_backward(Tensor grad, Tensor x, Tensor? layer_scale1, Tensor weight1, Tensor scale1, Tensor shift1, "
    "Tensor weight2, Tensor scale2, str activation, bool[] needed) -> Tensor[]",
    _implementation,
    _fake,
)
