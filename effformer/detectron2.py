"""A backbone for Detectron2: maps by name, `output_shape()`, `size_divisibility`.

Where Detectron2 is installed, the class derives from its `Backbone`, as its FPN requires, and shapes are its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .features import Features, check_rising
from .model.adapter import AdapterSpec
from .model.fusion import refuse_hooks


class ShapeSpec(NamedTuple):
    """A map's shape, with the fields of Detectron2's class of this name."""

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None


if TYPE_CHECKING:
    Base = nn.Module
else:
    try:  # absolute: Detectron2 itself
        from detectron2.layers import ShapeSpec
        from detectron2.modeling import Backbone as Base
    except ModuleNotFoundError as error:
        if error.name != "detectron2":  # installed, but broken
            raise
        Base = nn.Module

NAMES = ("res2", "res3", "res4", "res5")  # Detectron2's, for strides 4 to 32


def _by_name(names: Sequence[str], maps: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(names, maps, strict=True))


class EfficientFormerBackbone(Base):
    """Images [B, in_chans, H, W] -> maps [B, C, H / stride, W / stride] by name.

    Args:
        model: an `EfficientFormer`, which is modified in place: see `effformer.features.Features`.
        out_features: of `NAMES`, in their order.

    Raises:
        TypeError, ValueError: for another model, for other `out_features`.
    """

    def __init__(self, model: nn.Module, out_features: Sequence[str] = NAMES) -> None:
        super().__init__()
        check_rising("out_features", out_features, NAMES)
        self.out_features = tuple(out_features)
        self.features = Features(model, [NAMES.index(name) for name in out_features])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return _by_name(self.out_features, self.features(x))

    def describe_for_freeze(self, dtype: torch.dtype) -> AdapterSpec:
        """For `effformer.freeze`, see `effformer.model.adapter.Adapter`."""
        refuse_hooks(self)
        return replace(self.features.describe_for_freeze(dtype), convert=partial(_by_name, self.out_features))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each map."""
        maps = zip(self.out_features, self.features.channels, self.features.strides, strict=True)
        return {name: ShapeSpec(channels=channels, stride=stride) for name, channels, stride in maps}

    @property
    def size_divisibility(self) -> int:
        """Image sides must be multiples of this for a pyramid, which doubles maps. The network alone takes any."""
        return self.features.strides[-1]
