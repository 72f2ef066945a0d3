"""An adapter's description for `freeze`: its network, the results that it needs, and the form that it gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn

if TYPE_CHECKING:
    from .network import EfficientFormer


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter's network, and the way from its results to the adapter's.

    `convert` must not hold the adapter or its network: a frozen model keeps `convert`, and lets these be freed. It must
    be a function of a module, or an instance of a class of one, since frozen models are copied and pickled.

    Attributes:
        network: within the adapter.
        output: "logits", "pooled" or "features", of the network.
        convert: converts that output to the result of the adapter's forward.
        stages: those whose maps are the features; None for all.
        copied: a copy of the modules that `convert` calls, if any.
    """

    network: EfficientFormer
    output: Literal["logits", "pooled", "features"]
    convert: Callable[[Any], Any]
    stages: tuple[int, ...] | None = None
    copied: nn.Module | None = None


@runtime_checkable
class Adapter(Protocol):
    """A module around a network that `freeze` takes."""

    def describe_for_freeze(self, dtype: torch.dtype) -> AdapterSpec:
        """Describe the adapter, for a frozen model in `dtype`.

        Raises:
            ValueError: for an adapter with hooks.
        """
