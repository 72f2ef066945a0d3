"""Calls of `ops.meta4d_train`: drawn, computed three ways, and compared by the accuracy rule."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effformer import ops, reference
from effformer.accuracy import ParameterAccuracy, accuracy
from effformer.testing import draw_map, draw_vector, draw_weight, float32_as_such

TRAINED = 11  # x and the parameters
TENSORS = list(inspect.signature(reference.meta4d_train).parameters)[:17]


class TrainCase(NamedTuple):
    """Tensors in the operation's order, the gradient of the result, and options."""

    tensors: list[Any]
    grad: Tensor
    options: dict[str, Any]

    @property
    def hidden(self) -> int:
        return len(self.tensors[2])

    def by(self, how: str, needed: Sequence[bool] | None = None) -> tuple[list[Tensor], list[Any]]:
        """Result and statistics, and the gradients of x and the parameters; "exact" is the reference in float64."""
        leaves = []
        for place, one in enumerate(self.tensors):
            if one is not None:
                one = (one.double() if how == "exact" else one).detach()
                if place < TRAINED:
                    one.requires_grad_(needed is None or needed[place])
            leaves.append(one)
        eps = {"eps1": 1e-5, "eps2": 1e-5}
        if how == "exact":
            found = reference.meta4d_train(*leaves, **self.options, **eps)
        else:
            found = ops.meta4d_train(*leaves, **self.options, **eps, backend=how)
        found[0].backward(self.grad.to(found[0].dtype))
        return [one.detach() for one in found[:5]], [None if one is None else one.grad for one in leaves[:TRAINED]]


def draw(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    hidden: int | None = None,
    mean: float = 0.0,
    keep: bool = False,
    frozen: bool = False,
    bias: bool = True,
    layout: str = "channels_last",
    activation: str = "gelu",
) -> TrainCase:
    """A call whose input's channels have random means of this size, and whose gradient has means, too."""
    batch, channels, _, _ = shape
    hidden = hidden or 2 * channels + 3
    x = draw_map(shape, dtype, layout)
    if mean:
        x = (x.float() + mean * torch.randn(channels)[:, None, None]).to(dtype)
    tensors: list[Any] = [x, draw_vector(channels, 0.2, 0.8)]
    for outputs, inputs in ((hidden, channels), (channels, hidden)):
        tensors += [draw_weight(outputs, inputs, dtype), 0.2 * torch.randn(outputs) if bias else None]
        tensors += [draw_vector(outputs, 0.5, 1.5), 0.2 * torch.randn(outputs)]
    tensors.append(draw_vector(channels, 0.2, 0.8))
    factors = torch.tensor([0.0, *[1 / 0.7] * (batch - 1)])
    tensors += [factors, factors.flip(0)] if keep else [None, None]
    if frozen:
        for size in (hidden, channels):
            tensors += [0.2 * torch.randn(size), draw_vector(size, 0.5, 1.5)]
    else:
        tensors += [None] * 4
    grad = (torch.randn(shape) + 0.5 * torch.randn(channels)[:, None, None]).to(dtype)
    return TrainCase(tensors, grad.to(memory_format=torch.channels_last), {"activation": activation})


def within(case: TrainCase) -> list[str]:
    """Those of result, statistics and gradients that break the rule; statistics may err by 1e-6 of the largest."""
    with float32_as_such():
        three = [case.by(how) for how in ("triton", "exact", "eager")]
    names = ["result", "mean1", "var1", "mean2", "var2", *TENSORS[:TRAINED]]
    wrong = []
    for name, found, exact, eager in zip(names, *([*one[0], *one[1]] for one in three), strict=True):
        if exact is None:
            assert found is None
            continue
        error = accuracy(found, exact, eager)
        if name not in ("result", "x"):
            error = ParameterAccuracy(**vars(error))
        # PyTorch sums statistics in float64 on a CPU, and may hardly err at all.
        enough = name[:-1] in ("mean", "var") and error.max_error <= 1e-6 * exact.abs().max().item()
        if not (error.passes() or enough):
            wrong.append(f"{name}: {error}")
    return wrong
