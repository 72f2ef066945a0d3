"""Time the fused operations by our kernels and by other means: the work of `effformer bench kernels`.

A measurement is one operation at one shape in one dtype. All providers get the same drawn arguments, and each is in the
results file as soon as it is measured.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...accuracy import Accuracy, accuracy
from ...apps.verify import checks, draw
from ...apps.verify_report import NETWORK, Check, describe_dtype
from ...testing import Case, float32_as_such
from . import records
from .ceilings import CeilingTimes, measure_ceilings, speed
from .operation_providers import OURS, PROVIDERS, Form, OperationProvider
from .records import Key, Machine, Record
from .resume import DeviceLostError, FailedError, ResultsFile
from .roofline import Ceilings, cost
from .timing import Timing, device_time

FILE = "kernels.jsonl"
FIRST_BATCHES = (256, 1)
PIECE = 32  # images whose float64 result is computed at a time
Timer = Callable[[Callable[[], Callable[[], object]], torch.device, int], Timing]


def in_order(
    models: Sequence[str],
    operations: Iterable[str],
    dtypes: Sequence[torch.dtype],
    batch_sizes: Sequence[int],
    size: tuple[int, int] = (224, 224),
) -> list[Check]:
    """All measurements, each once, the most important first.

    Dtypes come in the order given; in each the batches of `FIRST_BATCHES`, model by model, then the others.
    """
    operations = [name for name in operations if name != NETWORK]
    first = [batch for batch in FIRST_BATCHES if batch in batch_sizes]
    others = [batch for batch in dict.fromkeys(batch_sizes) if batch not in first]
    found: dict[Key, Check] = {}
    for dtype in dict.fromkeys(dtypes):
        for batches in (first, others):
            for model in dict.fromkeys(models):
                for batch in batches:
                    for check in checks([model], operations, [dtype], size=size, batch_size=batch):
                        known = found.setdefault(key_of(check), check)
                        if known is not check:
                            found[key_of(check)] = replace(known, where=known.where + check.where)
    return list(found.values())


def begun(check: Check, provider: str, machine: Machine) -> Record:
    """The record that says that a provider was started."""
    details = {"options": dict(check.options), "where": list(check.where)}
    dtype = describe_dtype(check.dtype)
    return Record(check.operation, provider, "forward", dtype, check.shape, "begun", math.nan, machine, details=details)


def key_of(check: Check) -> Key:
    """The measurement, as the records name it."""
    return records.key_of(check.operation, describe_dtype(check.dtype), check.shape, check.options)


def is_complete(check: Check, file: ResultsFile, providers: Sequence[OperationProvider] = PROVIDERS) -> bool:
    """Whether every provider has a result."""
    return {one.name for one in providers if one.computes(check.operation)} <= file.providers(key_of(check))


def measure_operations(
    todo: Iterable[Check],
    file: ResultsFile,
    device: torch.device,
    *,
    providers: Sequence[OperationProvider] = PROVIDERS,
    timer: Timer = device_time,
    measure: Callable[[torch.device, torch.dtype], CeilingTimes] = measure_ceilings,
    tell: Callable[[str], object] = lambda line: None,
) -> Iterator[list[Record]]:
    """Measure the incomplete ones in order until the time of `file` is over; yield each measurement's records.

    float32 is float32's own (no TF32); cuDNN looks for its fastest algorithms.

    Args:
        todo: of `in_order`.
        file: takes each provider's records as soon as they are there, and the ceilings of each dtype.
        device: where to run.
        providers: who computes.
        timer: `device_time`.
        measure: `measure_ceilings`.
        tell: is told each measurement as it starts.

    Raises:
        DeviceLostError: where a provider broke the device, after it was recorded.
    """
    ceilings: dict[torch.dtype, Ceilings] = {}
    for check in todo:
        if is_complete(check, file, providers):
            continue
        if time.monotonic() > file.deadline:
            return
        if check.dtype not in ceilings:
            times = measure(device, check.dtype)
            ceilings[check.dtype] = times.ceilings
            file.add(times.records(file.machine))
        tell(f"{check} ...")
        with torch.no_grad(), float32_as_such():
            finished = _measure(check, file, device, ceilings[check.dtype], providers, timer)
        if found := file.records(key_of(check)):
            yield found
        if not finished:
            return


def _measure(
    check: Check,
    file: ResultsFile,
    device: torch.device,
    ceilings: Ceilings,
    providers: Sequence[OperationProvider],
    timer: Timer,
) -> bool:
    """Measure the providers without a result; False if the time was over before."""
    operation: Operation | None = None
    no_room = None
    try:
        operation = Operation.drawn(check, device, ceilings, timer)
    except torch.OutOfMemoryError:
        no_room = "the device has no room for the float64 result that errors are measured against"
    for provider in providers:
        if provider.computes(check.operation):
            start = begun(check, provider.name, file.machine)
            run = functools.partial(operation.measure, provider, start) if operation else list
            if not file.measure(start, run, provider.why_not(device, check.dtype) or no_room):
                return False
    return True


@contextlib.contextmanager
def _searching() -> Iterator[None]:
    """Let cuDNN try its algorithms for every new shape."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@dataclass(frozen=True)
class Operation:
    """One operation with drawn arguments, ready to be measured: `exact` in float64 and `eager` are its results."""

    check: Check
    device: torch.device
    ceilings: Ceilings
    timer: Timer
    case: Case
    exact: Tensor
    eager: Tensor

    @classmethod
    def drawn(cls, check: Check, device: torch.device, ceilings: Ceilings, timer: Timer) -> Operation:
        """Draw the arguments.

        Raises:
            OutOfMemoryError: if the device has no room for the float64 result.
        """
        case = draw(check, device)
        assert isinstance(case, Case), "networks are measured by networks.py"
        return cls(check, device, ceilings, timer, case, exact_of(case), case.run("eager"))

    def measure(self, provider: OperationProvider, start: Record) -> list[Record]:
        """The records of the provider's fastest form; `start` is its record with the metric "begun".

        Raises:
            FailedError: if no form runs.
            DeviceLostError: if one breaks the device.
        """
        torch.compiler.reset()  # else compilations for other shapes count against Dynamo's limits
        best: tuple[Timing, Accuracy, dict[str, Any]] | None = None
        failures = []
        for name, form in provider.forms(self.device).items():
            try:
                with _searching():
                    found = self._run(provider, form)
                if best is None or found[0].p50 < best[0].p50:
                    best = found[0], found[1], {"form": name, **found[2]}
            except Exception as error:  # of any kind: the other forms go on
                message = str(error).strip().partition("\n")[0][:200]
                failures.append(f"{name}: {type(error).__name__}: {message}")
            if not recovers(self.device):
                raise DeviceLostError(f"{provider.name} broke the device ({'; '.join(failures)})")
        if best is None:
            raise FailedError("; ".join(failures))
        timing, errors, details = best
        if failures:
            details["failed"] = failures
        return self._records(start, timing, errors, details)

    def _run(self, provider: OperationProvider, form: Form) -> tuple[Timing, Accuracy, dict[str, Any]]:
        details: dict[str, Any] = {}
        if provider.name == OURS:
            from ...kernels.launch import recorded

            with recorded() as launches:
                result = form(self.case)()
            details["kernels"] = [launch.kernel.__name__ for launch in launches]
            details["tiles"] = [launch.configuration for launch in launches]
            launches.clear()  # they hold tensors
        else:
            result = form(self.case)()
        errors = accuracy(result, self.exact, self.eager)
        if errors.misplaced:
            raise ValueError(f"{errors.misplaced} NaN or infinities where float64 has none, or the other way round")
        details["within the rule"] = errors.passes()
        del result
        timing = self.timer(lambda: form(copied(self.case)), self.device, int(self._cost[1]))
        return timing, errors, {**details, "repeats": timing.repeats}

    @property
    def _cost(self) -> tuple[float, float]:
        """FLOPs and bytes."""
        return cost(self.check.operation, self.check.shape, self.check.options, self.check.dtype)

    def _records(self, start: Record, timing: Timing, errors: Accuracy, details: dict[str, Any]) -> list[Record]:
        flops, traffic = self._cost
        fraction = self.ceilings.least_time(flops, traffic) / (timing.p50 / 1e3)
        found = [
            replace(start, metric="ms", p50=timing.p50, p20=timing.p20, p80=timing.p80, roofline=fraction,
                    details=start.details | details)
        ]  # fmt: skip
        for metric, amount in (("GB/s", traffic / 1e9), ("TFLOP/s", flops / 1e12)):
            if amount:
                p20, p50, p80 = speed(amount, timing)
                found.append(replace(start, metric=metric, p50=p50, p20=p20, p80=p80, roofline=fraction))
        scale = self.exact.abs().max().item() or 1.0
        for metric, error in (("max error", errors.max_error), ("mean error", errors.mean_error)):
            found.append(replace(start, metric=metric, p50=error / scale))
        return found


def recovers(device: torch.device) -> bool:
    """Whether the device can still be used. Frees the memory of the last form."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError:  # all that this process computes from now on would be meaningless
            return False
    return True


def exact_of(case: Case) -> Tensor:
    """`Case.exact`, some images at a time: float64 hidden activations of all of them may need too much memory."""
    x, *others = case.arguments
    pieces = [replace(case, arguments=(piece, *others)).exact() for piece in x.split(PIECE)]
    return torch.cat(pieces)


def copied(case: Case) -> Case:
    """The same call on tensors of its own."""
    return replace(case, arguments=tuple(argument.clone() for argument in case.arguments))
