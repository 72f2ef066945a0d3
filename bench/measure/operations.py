"""Time the fused operations by our kernels and by other means: the work of `effformer bench kernels`.

A measurement is one operation at one shape in one dtype. All providers get the same random arguments, and each is in
the results file as soon as it is measured.
"""

from __future__ import annotations

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
from ...apps.verify_report import Check, describe_dtype
from ...testing import Case, float32_as_such
from . import records
from .ceilings import CeilingTimes, measure_ceilings, speed
from .operation_providers import OURS, PROVIDERS, Form, OperationProvider
from .records import Key, Machine, Record
from .resume import DeviceLostError, FailedError, ResultsFile
from .roofline import Ceilings, cost
from .timing import Timer, Timing, device_time

FILE = "kernels.jsonl"
FIRST_BATCHES = (256, 1)
PIECE = 32  # images whose float64 result is computed at a time


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
        file: takes each provider's records when it is done, and the ceilings of each dtype.
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
        operation: Operation | None = None  # the last one's tensors are freed
        no_room = None
        if check.dtype not in ceilings:
            times = measure(device, check.dtype)
            ceilings[check.dtype] = times.ceilings
            file.add(times.records(file.machine))
        tell(f"{check} ...")
        with torch.no_grad(), float32_as_such():
            try:
                operation = Operation.of(check, device, ceilings[check.dtype], timer)
            except torch.OutOfMemoryError:
                no_room = "the device has no room for the float64 result that errors are measured against"
            finished = True
            for provider in providers:
                if finished and provider.computes(check.operation):
                    start = begun(check, provider.name, file.machine)
                    finished = file.measure(
                        start,
                        functools.partial(operation.measure, provider, start) if operation else list,
                        provider.why_not(device, check.dtype) or no_room,
                    )
        if found := file.records(key_of(check)):
            yield found
        if not finished:
            return


@dataclass(frozen=True)
class Operation:
    """One operation with random arguments, ready to be measured: `exact` in float64 and `eager` are its results."""

    device: torch.device
    ceilings: Ceilings
    timer: Timer
    case: Case
    exact: Tensor
    eager: Tensor
    flops: int
    traffic: int

    @classmethod
    def of(cls, check: Check, device: torch.device, ceilings: Ceilings, timer: Timer) -> Operation:
        """Draw the arguments.

        Raises:
            OutOfMemoryError: if the device has no room for the float64 result.
        """
        case = draw(check, device)
        assert isinstance(case, Case), "networks are measured by networks.py"
        amounts = cost(check.operation, check.shape, check.options, check.dtype)
        return cls(device, ceilings, timer, case, exact_of(case), case.run("eager"), *amounts)

    def measure(self, provider: OperationProvider, start: Record) -> list[Record]:
        """The records of the provider's fastest form; `start` is its record with the metric "begun".

        Raises:
            FailedError: if no form runs.
            DeviceLostError: if one breaks the device.
        """
        torch.compiler.reset()  # else compilations for other shapes count against Dynamo's limits
        best: tuple[Timing, Accuracy, dict[str, Any]] | None = None
        failures, searching = [], torch.backends.cudnn.benchmark
        for name, form in provider.forms(self.device).items():
            try:
                torch.backends.cudnn.benchmark = True  # cuDNN tries its algorithms for every new shape
                timing, errors, details = self._run(provider, form)
                if best is None or timing.p50 < best[0].p50:
                    best = timing, errors, {"form": name, **details}
            except Exception as error:  # of any kind: the other forms go on
                message = str(error).strip().partition("\n")[0][:200]
                failures.append(f"{name}: {type(error).__name__}: {message}")
            finally:
                torch.backends.cudnn.benchmark = searching
            if not recovers(self.device):
                raise DeviceLostError(f"{provider.name} broke the device ({'; '.join(failures)})")
        if best is None:
            raise FailedError("; ".join(failures))
        timing, errors, details = best
        details |= {"failed": failures} if failures else {}
        fraction = self.ceilings.least_time(self.flops, self.traffic) / (timing.p50 / 1e3)
        found = [
            replace(start, metric="ms", p50=timing.p50, p20=timing.p20, p80=timing.p80, roofline=fraction,
                    details=start.details | details)
        ]  # fmt: skip
        for metric, amount in (("GB/s", self.traffic / 1e9), ("TFLOP/s", self.flops / 1e12)):
            if amount:
                p20, p50, p80 = speed(amount, timing)
                found.append(replace(start, metric=metric, p50=p50, p20=p20, p80=p80, roofline=fraction))
        scale = self.exact.abs().max().item() or 1.0
        for metric, amount in (("max error", errors.max_error), ("mean error", errors.mean_error)):
            found.append(replace(start, metric=metric, p50=amount / scale))
        return found

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
        timing = self.timer(lambda: form(copied(self.case)), self.device, self.traffic)
        return timing, errors, {**details, "repeats": timing.repeats}


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
