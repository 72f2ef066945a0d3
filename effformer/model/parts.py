"""Small parts that the blocks share: activations, layer scale, stochastic depth, folding of BatchNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..reference import upcast
from .fusion import ACTIVATION_MODULES, is_active
from .steps import Fold


def activation(name: str, dd: dict[str, Any]) -> nn.Module:
    return nn.PReLU(**dd) if name == "prelu" else ACTIVATION_MODULES[name]()


def drop_path(rate: float) -> nn.Module:
    return DropPath(rate) if rate > 0 else nn.Identity()


class LayerScale(nn.Module):
    """Multiplication by a learned vector over dimension `dim` of the input, 1 for maps and -1 for tokens."""

    def __init__(self, width: int, init_value: float, *, dim: int, **dd: Any) -> None:
        super().__init__()
        self.dim = dim
        self.gamma = nn.Parameter(torch.full((width,), float(init_value), **dd))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.gamma[:, None, None] if self.dim == 1 else self.gamma)


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, a sample's branch is zeroed with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.draw(x) if self.training else x

    def draw(self, x: Tensor) -> Tensor:
        """A random factor for each image of x, 0 or 1 / (1 - rate), [B, 1, ...] in x's dtype."""
        keep = 1 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return mask / keep if keep > 0 else mask


DROP_PATHS = (nn.Identity, DropPath)


def factors(path: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Draw stochastic depth's factor of each image of x, float32 [B]; None where nothing is dropped.

    `path` draws in the branch's `dtype`, so these are the random numbers of its own forward.
    """
    if not (isinstance(path, DropPath) and is_active(path)):
        return None
    return upcast(path.draw(x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1), dtype=dtype)).flatten())


def fold_norm(
    fold: Fold, conv: nn.Conv2d, norm: nn.BatchNorm2d, layer_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None and var is not None  # noqa: PT018 (`why_composed` looked)
    folded = fold.fold_batch_norm(conv.bias, norm.weight, norm.bias, mean, var, norm.eps, layer_scale)
    return folded[0], folded[1]  # FX cannot unpack the result of a recorded call
