"""Shared by the adapters to detection frameworks: maps of chosen stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .checks import plain
from .model.adapter import AdapterSpec
from .model.fusion import refuse_hooks
from .model.netspresso import network_within


class Features(nn.Module):
    """The maps of some stages, from a network that is reduced to the parts they need.

    Args:
        model: an `EfficientFormer`, or a `Backbone` of `build_backbone`. It is modified in place: later stages, the
            final norm, the heads and norms of other maps are removed, so that each remaining parameter has a gradient,
            which DDP requires.
        out_indices: stages, rising, from 0 to 3.

    Attributes:
        channels, strides: of each map.

    Raises:
        TypeError: for another library's model.
        ValueError: for other `out_indices`.
    """

    def __init__(self, model: nn.Module, out_indices: Sequence[int] = (0, 1, 2, 3)) -> None:
        super().__init__()
        network = network_within(model)
        check_rising("out_indices", out_indices, range(len(network.stages)))
        self.network = network
        self.out_indices = plain(tuple(out_indices))
        self.channels = [network.feature_info[index]["num_chs"] for index in self.out_indices]
        self.strides = [network.feature_info[index]["reduction"] for index in self.out_indices]
        network.prune_intermediate_layers(self.out_indices, prune_norm=True)
        if network.config.feature_norm == "tap":
            for index in set(range(len(network.stages))) - set(self.out_indices):
                network.feature_norms[index] = nn.Identity()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images [B, in_chans, H, W] -> maps [B, C, ceil(H / stride), ceil(W / stride)]."""
        return self.network.forward_intermediates(x, indices=self.out_indices, intermediates_only=True)

    def describe_for_freeze(self, dtype: torch.dtype) -> AdapterSpec:
        """For `effformer.freeze`, see `effformer.model.adapter.Adapter`."""
        refuse_hooks(self)
        return AdapterSpec(self.network, "features", self.named, self.out_indices)

    @staticmethod
    def named(maps: list[Tensor]) -> Any:
        """Put the maps of the stages into the form that `forward` returns."""
        return maps


def check_rising(argument: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise a ValueError that names the argument unless `value` is some of `allowed`, in their order, each once."""
    got = [plain(one) for one in value] if isinstance(value, Sequence) else []
    same_type = all(type(one) is type(allowed[0]) for one in got)  # 1.0 and True equal 1
    if not got or not same_type or got != [one for one in allowed if one in got]:
        raise ValueError(f"{argument}: got {value!r}, allowed are, in this order, {', '.join(map(str, allowed))}")
