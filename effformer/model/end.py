"""The end of the network as a part: final norm, pooling, and the mean of both heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..backend import products_dtype
from ..checks import shape_of
from .fusion import change_of, is_active, is_plain, replaces
from .steps import Source, Step

if TYPE_CHECKING:
    from .network import EfficientFormer

NO_POOLED_END = "it has no pooled end"


@dataclass(frozen=True)
class End:
    """The end of `network`: tokens [B, N, C] -> logits [B, num_classes]."""

    network: EfficientFormer

    @property
    def owner(self) -> nn.Module:
        return self.network

    def watched(self) -> Iterator[nn.Module]:
        network = self.network
        yield from (network.norm, network.head_drop, network.head, network.head_dist)

    def settings(self) -> tuple[Any, ...]:
        network = self.network
        ends = network.norm, network.head_drop, network.head, network.head_dist
        options = network.training, network.global_pool, network.num_classes, network.distilled_training
        return *map(id, ends), *options, network.backend, len(network.stages), self._replaced()

    def _replaced(self) -> bool:
        """Whether the network has another end of its own."""
        from .network import EfficientFormer

        return replaces(self.network, EfficientFormer, "forward_head", "logits")

    def backends(self) -> set[str]:
        return {self.network.backend}

    def why_unplanned(self) -> str | None:
        if self._replaced():
            return "forward_head or logits was replaced"
        return self.why_not_pooled() or self.why_no_logits()

    def why_not_pooled(self) -> str | None:
        """The reason why the fused operation does not compute the pooled features; None where it does."""
        network = self.network
        complete = len(network.stages) == network.num_stages and is_plain(network.norm, (nn.LayerNorm,))
        if not complete or network.global_pool != "avg":
            return NO_POOLED_END
        if not is_plain(network.head_drop, (nn.Dropout,)) or is_active(network.head_drop):
            return "head_drop: it was replaced, has hooks or is active"
        return None

    def why_no_logits(self) -> str | None:
        """The reason why the fused operation does not compute the logits of pooled features."""
        network = self.network
        if network.num_classes == 0:
            return "it has no heads"
        for name, head in (("head", network.head), ("head_dist", network.head_dist)):
            if not is_plain(head, (nn.Linear,)):
                return f"{name} {change_of(head, (nn.Linear,))}"
        shapes = [shape_of(head.weight) for head in (network.head, network.head_dist)]  # type: ignore[arg-type]
        if shapes[0] != shapes[1]:
            return f"head has a weight of {shapes[0]} and head_dist of {shapes[1]}: replace both heads"
        both = network.training and network.distilled_training
        return "distilled training returns both heads' logits" if both else None

    def input(self, x: Tensor) -> Tensor | None:
        fits = x.ndim == 3 and x.shape[2] == self.network.num_features and x.stride(2) == 1
        # Under autocast the heads return its dtype, and the fused operation x's.
        return x if fits and x.dtype == products_dtype(x) else None

    def steps(self, source: Source, *, pooled: bool = False) -> Iterator[Step]:
        """Norm and pooling; without `pooled` also one head with the mean of both heads' weights and biases."""
        norm, one, other = self.network.norm, self.network.head, self.network.head_dist
        assert isinstance(norm, nn.LayerNorm)
        tensors = [source.upcast(norm.weight), source.upcast(norm.bias)]
        if not pooled:
            assert isinstance(one, nn.Linear)
            assert isinstance(other, nn.Linear)
            tensors += [source.mean(one.weight, other.weight), source.mean(one.bias, other.bias)]
        yield Step.of(source, "head", *tensors, eps=norm.eps)
