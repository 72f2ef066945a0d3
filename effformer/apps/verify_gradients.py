"""Verification of the gradients that kernels compute: the work of `effformer verify --backward`.

A check of an operation becomes one check for each of its arguments, of which all gradients are computed at once. They
are compared with those of `effformer.reference` in float64, by the rule of `Accuracy` or `ParameterAccuracy`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops, reference
from ..accuracy import Accuracy, ParameterAccuracy, accuracy
from ..bench.offline.execution import Execution, executing
from ..bench.offline.ptx.machine import Options
from ..testing import Case, draw_gradient, draw_map, float32_as_such, meta4d_train_case, unwritten_is_nan
from ..workload import DIFFERENTIABLE
from .verify import draw, summary, why_not_verified
from .verify_compiled import DEFAULT, device_of_target
from .verify_report import Check, Outcome


def arguments_of(operation: str) -> list[str]:
    """The names of an operation's tensors that have gradients, the input first."""
    signature = inspect.signature(getattr(reference, operation)).parameters.values()
    return [one.name for one in signature if one.kind is one.POSITIONAL_OR_KEYWORD and one.default is one.empty]


def gradient_checks(checks: Iterable[Check]) -> list[Check]:
    """A check for each argument of those that are of `DIFFERENTIABLE`, named "meta4d/weight1".

    With "meta4d" comes "meta4d_train", the same block in training.
    """
    found = []
    for check in checks:
        operations = [check.operation] if check.operation in DIFFERENTIABLE else []
        if check.operation == "meta4d":
            operations.append("meta4d_train")
        for operation in operations:
            found += [replace(check, operation=f"{operation}/{name}") for name in arguments_of(operation)]
    return found


class Found(NamedTuple):
    """The result of a call and the gradients of its arguments, None where one is not needed."""

    result: Tensor
    gradients: list[Any]


def gradients(
    function: Callable[..., Any], arguments: Sequence[Tensor], grad: Tensor, needed: Sequence[bool] | None = None
) -> Found:
    """Gradients of leaves with the values and strides of `arguments`, for the gradient `grad` of the first result."""
    wanted = [True] * len(arguments) if needed is None else needed
    leaves = [one.detach().requires_grad_(want) for one, want in zip(arguments, wanted, strict=True)]
    with torch.enable_grad():
        found: Any = function(*leaves)
        result: Tensor = found[0] if isinstance(found, tuple) else found
        result.backward(grad.to(result.dtype))
    return Found(result.detach(), [one.grad for one in leaves])


@dataclass(frozen=True)
class Gradients:
    """All gradients of a call, for a gradient of its result; of some arguments those that are `needed`."""

    case: Case
    grad: Tensor

    def by(self, backend: str, needed: Sequence[bool] | None = None) -> Found:
        """By a backend of `effformer.ops`."""
        function = partial(getattr(ops, self.case.operation), **self.case.options, backend=backend)
        return gradients(function, self.case.arguments, self.grad, needed or self._have)

    def exact(self, needed: Sequence[bool] | None = None) -> Found:
        """By the reference in float64."""
        function = partial(getattr(reference, self.case.operation), **self.case.options)
        arguments = [one.double() for one in self.case.arguments]
        return gradients(function, arguments, self.grad, needed or self._have)

    @property
    def _have(self) -> list[bool]:
        """Of each argument, whether it has a gradient."""
        return [place < len(arguments_of(self.case.operation)) for place in range(len(self.case.arguments))]


def errors(found: Found, exact: Found, eager: Found) -> Iterator[Accuracy]:
    """Errors of each gradient, which know their rule: that of parameters for all but the first."""
    for place, three in enumerate(zip(found.gradients, exact.gradients, eager.gradients, strict=True)):
        if three[1] is None:
            continue
        error = accuracy(*three)
        yield ParameterAccuracy(**vars(error)) if place else error


def verify_gradients(
    checks: Iterable[Check], device: torch.device, *, seed: int = 0, repeats: int = 1
) -> Iterator[Outcome]:
    """Run checks of `gradient_checks` on `device`; as `effformer.apps.verify.verify`, of which all else holds, too."""
    for operation, group in _grouped(checks):
        reason = why_not_verified(device, operation.dtype)
        if reason:
            yield from (Outcome(check, skipped=reason) for check in group)
        else:
            yield from _outcomes(operation, group, device, seed, repeats, contextlib.nullcontext)


def verify_gradients_compiled(
    checks: Iterable[Check], target: str, *, seed: int = 0, options: Options = DEFAULT
) -> Iterator[Outcome]:
    """Run checks of `gradient_checks` as `verify_compiled` does.

    Raises:
        ValueError, RuntimeError: as `verify_compiled` does.
    """
    device = device_of_target(target)
    with executing(device):  # raises where it cannot
        pass
    for operation, group in _grouped(checks):
        yield from _outcomes(operation, group, torch.device("cpu"), seed, 0, lambda: executing(device, options=options))


def _grouped(checks: Iterable[Check]) -> Iterator[tuple[Check, list[Check]]]:
    """The checks of operations, each with those of its arguments."""
    groups: dict[tuple[object, ...], tuple[Check, list[Check]]] = {}
    for check in checks:
        operation = replace(check, operation=check.operation.partition("/")[0])
        key = operation.operation, operation.shape, operation.dtype, str(operation.options)
        groups.setdefault(key, (operation, []))[1].append(check)
    yield from groups.values()


def _draw(check: Check, device: torch.device, seed: int) -> Case:
    """A random call of an operation."""
    if check.operation == "meta4d_train":
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            return meta4d_train_case(draw_map(check.shape, check.dtype), **check.options).to(device)
    case = draw(check, device, seed)
    assert isinstance(case, Case)
    return case


def _outcomes(
    operation: Check,
    checks: list[Check],
    device: torch.device,
    seed: int,
    repeats: int,
    context: Callable[[], contextlib.AbstractContextManager[Execution | None]],
) -> Iterator[Outcome]:
    """The outcome of each argument. An error becomes that of all."""
    from ..kernels.launch import recorded

    try:
        case = _draw(operation, device, seed)
        subject = Gradients(case, draw_gradient(case, seed))
        with float32_as_such():
            with unwritten_is_nan(), recorded() as launches, context() as execution:
                found = subject.by("triton")
            ran = summary(launches)
            launches.clear()  # they hold tensors
            again = [subject.by("triton") for _ in range(repeats)]
            exact, eager = subject.exact(), subject.by("eager")
    except Exception as error:  # of any kind: it is the outcome of these checks, and the others go on
        raised = f"{type(error).__name__}: {error}"
        yield from (Outcome(check, raised=raised) for check in checks)
        return
    faults = tuple(f"{kernel}: {fault}" for kernel, fault in execution.faults) if execution else ()
    of = dict(zip(arguments_of(operation.operation), errors(found, exact, eager), strict=True))
    places = {name: place for place, name in enumerate(of)}
    for check in checks:
        name = check.operation.partition("/")[2]
        one = found.gradients[places[name]]
        differing = sum(not torch.equal(other.gradients[places[name]], one) for other in again)
        yield Outcome(check, of[name], repeats, differing, ran, faults)
