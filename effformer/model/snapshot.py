"""What `freeze` takes of an adapter: the network within, the results that it needs, and their form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch

if TYPE_CHECKING:
    from .network import EfficientFormer


@dataclass(frozen=True)
class Snapshot:
    """Of an adapter around `network`.

    Attributes:
        output: "logits", "pooled" or "features", of the network.
        give: from that output to what the adapter's forward returns.
        stages: whose maps are features; None for all.
    """

    network: EfficientFormer
    output: Literal["logits", "pooled", "features"]
    give: Callable[[Any], Any]
    stages: tuple[int, ...] | None = None


@runtime_checkable
class Adapter(Protocol):
    """A module around a network that `freeze` takes."""

    def snapshot(self, dtype: torch.dtype) -> Snapshot:
        """Its network and the form of its results, for a snapshot in `dtype`.

        Raises:
            ValueError: for an adapter with hooks.
        """
