"""A whole 4D MetaBlock in eval mode: pooling token mixer, then MLP; paper section 4, MB4D.

One kernel where a row's channels fit on chip; pooling and two matrix products elsewhere, and for few rows parts of the
hidden channels and their sum: all behind the same operator.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .conv_mlp import mlp_launch
from .launch import Launch
from .layout import filled_map, map_rows, new_map, packed
from .linear import mlp_products
from .pool_mixer import pool_mixer_launch
from .register import register
from .split_mlp import check_deterministic, split_mlp_launches
from .tiling.choose import mlp_config
from .tiling.device import device_of
from .tiling.table import SplitConfig


def meta4d_launches(
    x: Tensor,
    layer_scale1: Tensor,
    weight1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    activation: str,
    deterministic: bool = True,
    *,
    out: Tensor,
) -> list[Launch]:
    """One launch, two with the hidden split over programs, or three with mixer's result and hidden in memory."""
    check_deterministic(deterministic)
    rows = map_rows(x)
    config = mlp_config("meta4d", rows.channels, rows.count, weight1.dtype, device_of(x.device))
    if isinstance(config, SplitConfig):
        mlp = (weight1, scale1, shift1, weight2, scale2, shift2, activation)
        return split_mlp_launches(rows, rows, layer_scale1, *mlp, map_rows(out), config, deterministic=deterministic)
    if config is not None:
        return [mlp_launch(x, layer_scale1, weight1, scale1, shift1, weight2, scale2, shift2, activation, out, config)]
    mixed = map_rows(new_map(x))
    return [
        pool_mixer_launch(x, layer_scale1, mixed.tensor),
        *mlp_products(mixed, mixed, weight1, scale1, shift1, weight2, scale2, shift2, activation, map_rows(out)),
    ]


def _implementation(x: Tensor, *arguments: Any) -> Tensor:
    return filled_map(x, lambda source, out: meta4d_launches(source, *packed(*arguments), out=out))


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    return new_map(x)


meta4d = register(
    "meta4d(Tensor x, Tensor layer_scale1, Tensor weight1, Tensor scale1, Tensor shift1, Tensor weight2, "
    "Tensor scale2, Tensor shift2, str activation, bool deterministic=True) -> Tensor",
    _implementation,
    _fake,
)
