"""An adapter's description for `freeze`: its network, the results that it needs, and the form that it gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch

if TYPE_CHECKING:
    from .network import EfficientFormer


@dataclass(frozen=True)
class Snapshot:
    """An adapter's description.

    Attributes:
        network: within the adapter.
        output: "logits", "pooled" or "features", of the network.
        give: converts that output to the result of the adapter's forward.
        stages: those whose maps are the features; None for all.
    """

    network: EfficientFormer
    output: Literal["logits", "pooled", "features"]
    give: Callable[[Any], Any]
    stages: tuple[int, ...] | None = None


@runtime_checkable
class Adapter(Protocol):
    """A module around a network that `freeze` takes."""

    def snapshot(self, dtype: torch.dtype) -> Snapshot:
        """Describe the adapter, for a frozen model in `dtype`.

        Raises:
            ValueError: for an adapter with hooks.
        """
