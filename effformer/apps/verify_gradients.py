"""Verification of the gradients that kernels compute: the work of `effformer verify --backward`.

A check of an operation becomes one check for each of its arguments, of which all gradients are computed at once. They
are compared with those of `effformer.reference` in float64, by the rule of `Accuracy` or `ParameterAccuracy`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import ops, reference
from ..accuracy import Accuracy, ParameterAccuracy, accuracy
from ..bench.offline.execution import Execution, executing
from ..bench.offline.ptx.machine import Options
from ..testing import Case, draw_gradient, float32_as_such, unwritten_is_nan
from ..workload import DIFFERENTIABLE
from .verify import draw, summary, why_not_verified
from .verify_compiled import DEFAULT, device_of_target
from .verify_report import Check, Outcome


def arguments_of(operation: str) -> list[str]:
    """The names of an operation's tensors, the input first."""
    signature = inspect.signature(getattr(reference, operation)).parameters.values()
    return [one.name for one in signature if one.kind is one.POSITIONAL_OR_KEYWORD and one.default is one.empty]


def gradient_checks(checks: Iterable[Check]) -> list[Check]:
    """A check for each argument of those that are of `DIFFERENTIABLE`, named "meta4d/weight1"."""
    return [
        replace(check, operation=f"{check.operation}/{name}")
        for check in checks
        if check.operation in DIFFERENTIABLE
        for name in arguments_of(check.operation)
    ]


@dataclass(frozen=True)
class Gradients:
    """All gradients of a call, for a random gradient of its result."""

    case: Case
    grad: Tensor

    def by(self, backend: str) -> list[Tensor]:
        """By a backend of `effformer.ops`."""
        return self._of(
            lambda *given: getattr(ops, self.case.operation)(*given, **self.case.options, backend=backend),
            self.case.arguments,
        )

    def exact(self) -> list[Tensor]:
        """By the reference in float64."""
        return self._of(
            lambda *given: getattr(reference, self.case.operation)(*given, **self.case.options),
            tuple(one.double() for one in self.case.arguments),
        )

    def _of(self, function: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> list[Tensor]:
        leaves = [one.detach().requires_grad_() for one in arguments]  # with the strides of the arguments
        with torch.enable_grad():
            result = function(*leaves)
            return list(torch.autograd.grad(result, leaves, self.grad.to(result.dtype)))


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
        case = draw(operation, device, seed)
        assert isinstance(case, Case)
        subject = Gradients(case, draw_gradient(case.arguments[0], seed))
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
    places = {name: place for place, name in enumerate(arguments_of(operation.operation))}
    for check in checks:
        place = places[check.operation.partition("/")[2]]
        errors: Accuracy = accuracy(found[place], exact[place], eager[place])
        if place:
            errors = ParameterAccuracy(**vars(errors))
        differing = sum(not torch.equal(one[place], found[place]) for one in again)
        yield Outcome(check, errors, repeats, differing, ran, faults)
