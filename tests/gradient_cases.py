"""Gradients of the fused operations: drawn, computed three ways, and compared by the accuracy rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from effformer import ops, reference
from effformer.accuracy import Accuracy, ParameterAccuracy, accuracy
from effformer.testing import (
    Case,
    conv_mlp_case,
    draw_gradient,
    float32_as_such,
    meta4d_case,
    pool_mixer_case,
)

CASES: dict[str, Callable[[Tensor], Case]] = {
    "pool_mixer": pool_mixer_case,
    "conv_mlp": lambda x: conv_mlp_case(x, 2 * x.shape[1] + 3),
    "meta4d": lambda x: meta4d_case(x, 2 * x.shape[1] + 3),
}
SHAPE = (2, 24, 11, 13)  # 286 pixels: more than two tiles of rows, and channels that no tile divides


@dataclass(frozen=True)
class Gradients:
    """The result of a call and the gradients of its arguments, None where it is not needed."""

    result: Tensor
    of: list[Tensor | None]


def of(
    function: Callable[..., Tensor], arguments: Sequence[Tensor], grad: Tensor, needed: Sequence[bool] | None = None
) -> Gradients:
    """Gradients of leaves with the arguments' values, for the gradient `grad` of the result."""
    wanted = [True] * len(arguments) if needed is None else needed
    # Not cloned: a leaf keeps the argument's strides.
    leaves = [one.detach().requires_grad_(want) for one, want in zip(arguments, wanted, strict=True)]
    result = function(*leaves)
    result.backward(grad.to(result.dtype))
    return Gradients(result.detach(), [one.grad for one in leaves])


def draw_grad(case: Case) -> Tensor:
    """Of a result like the input."""
    return draw_gradient(case.arguments[0], seed=7)


def by(case: Case, how: str, grad: Tensor, needed: Sequence[bool] | None = None) -> Gradients:
    """Gradients by a backend, or ("exact") by the reference in float64."""
    if how == "exact":
        function = getattr(reference, case.operation)
        arguments = [one.double() for one in case.arguments]
        return of(lambda *given: function(*given, **case.options), arguments, grad.double(), needed)
    function = getattr(ops, case.operation)
    return of(lambda *given: function(*given, **case.options, backend=how), case.arguments, grad, needed)


def errors(case: Case, grad: Tensor | None = None, how: str = "triton") -> dict[str, tuple[Accuracy, bool]]:
    """By argument: errors of its gradient, and whether they are within the rule."""
    grad = draw_grad(case) if grad is None else grad
    with float32_as_such():
        found, exact, eager = (by(case, one, grad) for one in (how, "exact", "eager"))
    names = ["result", "x", *(f"argument {place}" for place in range(1, len(case.arguments)))]
    checked = {}
    for name, *three in zip(names, *([one.result, *one.of] for one in (found, exact, eager)), strict=True):
        error = accuracy(*three)
        if name not in ("result", "x"):
            error = ParameterAccuracy(**vars(error))
        checked[name] = error, error.passes()
    return checked


def check(case: Case, grad: Tensor | None = None) -> None:
    """The rule for all gradients."""
    wrong = {name: str(error) for name, (error, within) in errors(case, grad).items() if not within}
    assert not wrong, wrong
