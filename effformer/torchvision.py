"""A backbone for torchvision's detectors: an ordered dict of maps, and `out_channels`. Needs torchvision."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .extras import install
from .features import Features
from .model.adapter import AdapterSpec
from .model.fusion import refuse_hooks

try:  # absolute: torchvision itself
    from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork, LastLevelMaxPool
except ImportError as error:
    raise ImportError(f"effformer.torchvision: no torchvision: {install('timm')}, which brings it") from error


class Body(Features):
    """Images -> an ordered dict of maps, "0" for the first one wanted, as torchvision's backbones name them.

    Arguments, attributes and errors are those of `effformer.features.Features`.
    """

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:  # type: ignore[override]
        return self.named(super().forward(x))

    @staticmethod
    def named(maps: list[Tensor]) -> OrderedDict[str, Tensor]:
        return OrderedDict((str(index), feature) for index, feature in enumerate(maps))


class BackboneWithFPN(nn.Module):
    """A network under torchvision's feature pyramid: the `backbone` argument of its detectors.

    It replaces `torchvision.models.detection.backbone_utils.BackboneWithFPN`, which looks for stages among the direct
    children of its body.

    Args:
        model, out_indices: see `effformer.features.Features`.
        out_channels: of every map of the pyramid.
        extra_blocks: makes coarser maps; torchvision's `LastLevelMaxPool` by default.
        norm_layer: of the pyramid's convolutions.
    """

    def __init__(
        self,
        model: nn.Module,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        out_channels: int = 256,
        extra_blocks: ExtraFPNBlock | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.body = Body(model, out_indices)
        extra_blocks = extra_blocks or LastLevelMaxPool()
        self.fpn = FeaturePyramidNetwork(self.body.channels, out_channels, extra_blocks, norm_layer)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Images [B, in_chans, H, W] -> maps [B, out_channels, h, w] by name, the finest first."""
        maps: OrderedDict[str, Tensor] = self.fpn(self.body(x))
        return maps

    def describe_for_freeze(self, dtype: torch.dtype) -> AdapterSpec:
        """For `effformer.freeze`: the pyramid is copied, and stays in PyTorch."""
        refuse_hooks(self)
        body, fpn = self.body.describe_for_freeze(dtype), copy.deepcopy(self.fpn).to(dtype).eval()
        return replace(body, convert=partial(_pyramid, fpn, body.convert), copied=fpn)


@torch.no_grad()
def _pyramid(fpn: nn.Module, named: Callable[[list[Tensor]], Any], maps: list[Tensor]) -> OrderedDict[str, Tensor]:
    found: OrderedDict[str, Tensor] = fpn(named(maps))
    return found
