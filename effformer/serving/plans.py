"""The calls of a frozen model that no graph serves: attention biases and plans, kept for some image sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..model.live import add_bounded, form_of
from .packing import Packed

if TYPE_CHECKING:
    from ..kernels.plan import Plan

_SIZES = 8  # image sizes whose attention biases are kept
_PLANS = 64  # of a size: one for each batch size, strides and dtype


@dataclass(frozen=True)
class _Size:
    """The attention biases of images of one size, and the plans that read them, by the form of the images."""

    biases: list[Tensor]
    plans: dict[Any, Plan | None] = field(default_factory=dict)


class Plans:
    """Runs the steps of `packed` with a backend, "eager" or "triton"."""

    def __init__(self, packed: Packed, backend: str) -> None:
        self._packed, self._backend = packed, backend
        self._sizes: dict[tuple[int, int], _Size] = {}

    def clear(self) -> None:
        """Forget all biases: the weights changed."""
        self._sizes.clear()

    def run(self, images: Tensor, *, keep: bool) -> Tensor | list[Tensor]:
        """The result for images; without `keep` nothing is kept for later calls, nor taken from earlier ones."""
        packed, backend = self._packed, self._backend
        sides = images.shape[2], images.shape[3]
        if not keep:
            return packed.run(images, packed.biases(*sides, backend), backend)
        size = self._sizes.get(sides)
        if size is None:
            size = _Size(packed.biases(*sides, backend))
            add_bounded(self._sizes, sides, size, _SIZES)
        if images.is_cuda:
            for bias in size.biases:  # it may be freed while this stream still reads it
                bias.record_stream(torch.cuda.current_stream())
        plan = self._plan(size, images) if backend == "triton" and len(images) else None
        if plan is None:
            return packed.run(images, size.biases, backend)
        return plan(images, lambda: [*packed.tensors(), *size.biases])

    def into_own_memory(self, images: Tensor, biases: list[Tensor]) -> Callable[[], Tensor | list[Tensor]]:
        """A forward on these images whose results lie in the same memory each time, allocated here."""
        packed = self._packed
        if (plan := packed.plan(images, biases) if self._backend == "triton" else None) is not None:
            tensors, own = [*packed.tensors(), *biases], plan.new_results(images.device)
            return lambda: plan(images, lambda: tensors, own)
        first = packed.run(images, biases, self._backend)
        single = isinstance(first, Tensor)
        results = [torch.empty_like(one) for one in ([first] if isinstance(first, Tensor) else first)]

        def forward() -> Tensor | list[Tensor]:
            found = packed.run(images, biases, self._backend)
            for target, source in zip(results, [found] if isinstance(found, Tensor) else found, strict=True):
                target.copy_(source)
            return results[0] if single else results

        return forward

    def _plan(self, size: _Size, images: Tensor) -> Plan | None:
        form = form_of(images, self._packed.dtype)
        if form not in size.plans:
            add_bounded(size.plans, form, self._packed.plan(images, size.biases), _PLANS)
        return size.plans[form]
