"""MLP on maps: x + scale2 * (W2 · act(scale1 * (W1 · x) + shift1)) + shift2; paper section 4, MB4D.

`meta4d.py` without its pooling: the same kernel, the same choice of launches.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .launch import Launch
from .layout import Mlp, filled_map, new_map, packed
from .meta4d import map_mlp_launches
from .register import register


def conv_mlp_launches(x: Tensor, *mlp: Any, out: Tensor) -> list[Launch]:
    """The MLP's launches; `mlp` are the fields of `Mlp`."""
    return map_mlp_launches("conv_mlp", x, None, Mlp(*mlp), out)


def _implementation(x: Tensor, *arguments: Any) -> Tensor:
    return filled_map(x, lambda source, out: conv_mlp_launches(source, *packed(*arguments), out=out))


conv_mlp = register(
    "conv_mlp(Tensor x, Tensor weight1, Tensor scale1, Tensor shift1, Tensor weight2, Tensor scale2, Tensor shift2, "
    "str activation, bool deterministic=True) -> Tensor",
    _implementation,
    new_map,
)
