"""Gradients of the fused operations: drawn, computed three ways, and compared by the accuracy rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from effformer.accuracy import Accuracy, accuracy
from effformer.apps import verify_gradients
from effformer.apps.verify_gradients import Found, Gradients
from effformer.testing import (
    Case,
    attention_mixer_case,
    bias_attention_case,
    conv_mlp_case,
    draw_gradient,
    draw_map,
    float32_as_such,
    linear_mlp_case,
    meta4d_case,
    pool_mixer_case,
)

MAPS: dict[str, Callable[[Tensor], Case]] = {
    "pool_mixer": pool_mixer_case,
    "conv_mlp": lambda x: conv_mlp_case(x, 2 * x.shape[1] + 3),
    "meta4d": lambda x: meta4d_case(x, 2 * x.shape[1] + 3),
}
HEADS = {"num_heads": 2, "key_dim": 16, "value_dim": 24}
TOKENS: dict[str, Callable[[Tensor], Case]] = {
    "bias_attention": lambda x: bias_attention_case(*x.shape[:2], x.dtype, **HEADS),
    "attention_mixer": lambda x: attention_mixer_case(x, **HEADS),
    "linear_mlp": lambda x: linear_mlp_case(x, 2 * x.shape[2] + 3),
}
# Of maps more than two tiles of rows, and channels that no tile divides; of tokens more than one tile, too, in float32.
SHAPE, TOKENS_SHAPE = (2, 24, 11, 13), (3, 43, 40)


def draw(operation: str, dtype: torch.dtype, mean: float = 0.0) -> Case:
    """A call, whose input's channels have random means of this size."""
    make = (MAPS | TOKENS)[operation]
    if operation in TOKENS:
        return make((torch.randn(TOKENS_SHAPE) + mean * torch.randn(TOKENS_SHAPE[2])).to(dtype))
    x = draw_map(SHAPE, torch.float32)
    x += mean * torch.randn(x.shape[1])[:, None, None]
    return make(x.to(dtype))


def of(
    function: Callable[..., Tensor], arguments: Sequence[Tensor], grad: Tensor, needed: Sequence[bool] | None = None
) -> Found:
    """As `verify_gradients.gradients`."""
    return verify_gradients.gradients(function, arguments, grad, needed)


def draw_grad(case: Case) -> Tensor:
    """Of the result."""
    return draw_gradient(case, seed=7)


def by(case: Case, how: str, grad: Tensor, needed: Sequence[bool] | None = None) -> Found:
    """Gradients by a backend, or ("exact") by the reference in float64."""
    subject = Gradients(case, grad)
    return subject.exact(needed) if how == "exact" else subject.by(how, needed)


def errors(case: Case, grad: Tensor | None = None, how: str = "triton") -> dict[str, tuple[Accuracy, bool]]:
    """By argument: errors of its gradient, and whether they are within the rule; the result's come first."""
    grad = draw_grad(case) if grad is None else grad
    with float32_as_such():
        three = [by(case, one, grad) for one in (how, "exact", "eager")]
    result = accuracy(*(one.result for one in three))
    names = verify_gradients.arguments_of(case.operation)
    found = {"result": result, **dict(zip(names, verify_gradients.errors(*three), strict=True))}
    return {name: (error, error.passes()) for name, error in found.items()}


def check(case: Case, grad: Tensor | None = None) -> None:
    """The rule for all gradients."""
    wrong = {name: str(error) for name, (error, within) in errors(case, grad).items() if not within}
    assert not wrong, wrong
