"""The fused operations timed against what one could take instead: what `effformer bench kernels` does.

A cell is one operation at one shape in one dtype. All its providers are measured in one go, on the same drawn
arguments, against ceilings measured in the same run; a cell that is recorded for this machine is not measured again.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from math import nan
from typing import Any

import torch
from torch import Tensor

from ...apps.verify import checks, draw
from ...apps.verify_report import NETWORK, Check, describe_dtype, describe_shape
from ...testing import Accuracy, Case, accuracy, float32_as_such
from .ceilings import Measured, measure_ceilings, speed
from .operation_providers import OURS, PROVIDERS, Form, Provider
from .process import cache_folder
from .records import Machine, Record
from .resume import Attempts, sources
from .roofline import Ceilings, cost
from .timing import Timing, device_time

FIRST_BATCHES = (256, 1)
MOST_ATTEMPTS = 2
PIECE = 32  # images whose float64 result is computed at a time
Key = tuple[str, str, tuple[int, ...], str]


class DeviceLostError(RuntimeError):
    """A provider broke the device for this process. It is recorded as not run: the next call goes on after it."""


def cells(
    models: Sequence[str],
    operations: Iterable[str],
    dtypes: Sequence[torch.dtype],
    batch_sizes: Sequence[int],
    size: tuple[int, int] = (224, 224),
) -> list[Check]:
    """All that there is to measure, each once, the most important first.

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


def key_of(check: Check) -> Key:
    return check.operation, describe_dtype(check.dtype), check.shape, json.dumps(check.options, sort_keys=True)


def code() -> str:
    """See `sources`."""
    return sources()


def recorded_cells(records: Iterable[Record], machine: Machine) -> set[Key]:
    """The cells that were measured on this machine with these versions and this code, whenever it was."""

    def here(record: Record) -> bool:
        same = replace(machine, date=record.machine.date, commit=record.machine.commit)
        return record.machine == same and record.evidence.get("sources") == code()

    return {
        (record.op, record.dtype, record.shape, json.dumps(record.evidence["options"], sort_keys=True))
        for record in records
        if "options" in record.evidence and here(record)
    }


def begun(machine: Machine) -> Attempts:
    """The providers that were begun and came to no end: one that takes the process with it twice is left out then."""
    return Attempts(cache_folder().with_name("begun.jsonl"), machine, code())


def bench(
    todo: Iterable[Check],
    device: torch.device,
    machine: Machine,
    *,
    seconds: float,
    attempts: Attempts,
    providers: Sequence[Provider] = PROVIDERS,
    timer: Callable[[Callable[[], Callable[[], object]], torch.device, int], Timing] = device_time,
    measure: Callable[[torch.device, torch.dtype], Measured] = measure_ceilings,
) -> Iterator[list[Record] | None]:
    """The records of the ceilings of each dtype, and of each cell of `todo`; a last None says: the time is over.

    float32 is float32's own (no TF32); cuDNN looks for its fastest algorithms.

    Args:
        todo: of `cells`.
        device: where to run.
        machine: as it is recorded.
        seconds: after which no cell is begun.
        attempts: see `begun`.
        providers: who is measured.
        timer: `device_time`.
        measure: `measure_ceilings`.

    Raises:
        DeviceLostError: where a provider broke the device, after its cell's records.
    """
    end = time.monotonic() + seconds
    ceilings: dict[torch.dtype, Ceilings] = {}
    for check in todo:
        if time.monotonic() > end:
            yield None
            return
        if check.dtype not in ceilings:
            measured = measure(device, check.dtype)
            ceilings[check.dtype] = measured.ceilings
            yield measured.records(machine)
        cell = _Cell(check, device, machine, ceilings[check.dtype], timer, attempts)
        with torch.no_grad(), float32_as_such():
            records = cell.measure(providers)
        yield records
        if cell.lost:
            raise DeviceLostError(f"{check}: {cell.lost} broke the device")


@contextlib.contextmanager
def _searching() -> Iterator[None]:
    """cuDNN tries its algorithms for every new shape."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class _Cell:
    """One operation at one shape in one dtype. `lost` is the provider that broke the device."""

    def __init__(
        self,
        check: Check,
        device: torch.device,
        machine: Machine,
        ceilings: Ceilings,
        timer: Callable[..., Timing],
        attempts: Attempts,
    ) -> None:
        self.check, self.device, self.machine, self.timer, self.attempts = check, device, machine, timer, attempts
        self.flops, self.bytes = cost(check.operation, check.shape, check.options, check.dtype)
        self.floor = ceilings.floor(self.flops, self.bytes)
        self.lost: str | None = None

    def measure(self, providers: Sequence[Provider]) -> list[Record]:
        providers = [provider for provider in providers if provider.computes(self.check.operation)]
        case = draw(self.check, self.device)
        assert isinstance(case, Case), "no network is a cell"
        try:
            exact, eager = exact_of(case), case.run("eager")
        except torch.OutOfMemoryError:
            reason = "the device has no room for the float64 result that errors are measured against"
            return [self._not_run(provider, reason) for provider in providers]
        records: list[Record] = []
        for provider in providers:
            if self.lost:
                records.append(self._not_run(provider, f"{self.lost} had broken the device"))
            elif (why_not := provider.why_not(self.device, self.check.dtype)) is not None:
                records.append(self._not_run(provider, why_not))
            elif self.attempts.count(provider.name, key_of(self.check)) >= MOST_ATTEMPTS:
                records.append(self._not_run(provider, "it was begun twice, and came to no end", failed=True))
            else:
                self.attempts.add(provider.name, key_of(self.check))
                try:
                    records += self._measured(provider, case, exact, eager)
                finally:
                    self.attempts.remove(provider.name, key_of(self.check))
        return records

    def _measured(self, provider: Provider, case: Case, exact: Tensor, eager: Tensor) -> list[Record]:
        """Of the fastest form that runs."""
        torch.compiler.reset()  # what was compiled for other shapes counts against Dynamo's limits
        forms = provider.forms(self.device)
        best: tuple[Timing, Accuracy, dict[str, Any]] | None = None
        failures = []
        for name, form in forms.items():
            try:
                with _searching():
                    found = self._run(provider, form, case, exact, eager)
                if best is None or found[0].p50 < best[0].p50:
                    best = found[0], found[1], {"form": name, **found[2]}
            except Exception as error:  # whatever it is, it is this form's, and the others are to go on
                what = str(error).strip().partition("\n")[0][:200]
                failures.append(f"{name}: {type(error).__name__}: {what}")
            if not self._recovers():
                self.lost = provider.name
                return [self._not_run(provider, f"broke the device ({'; '.join(failures)})", failed=True)]
        if best is None:
            return [self._not_run(provider, "; ".join(failures), failed=True)]
        timing, errors, evidence = best
        if failures:
            evidence["failed"] = failures
        return self._records(provider, timing, errors, exact.abs().max().item(), evidence)

    def _run(
        self, provider: Provider, form: Form, case: Case, exact: Tensor, eager: Tensor
    ) -> tuple[Timing, Accuracy, dict[str, Any]]:
        evidence: dict[str, Any] = {}
        if provider.name == OURS:
            from ...kernels.launch import recorded

            with recorded() as launches:
                result = form(case)()
            evidence["kernels"] = [launch.kernel.__name__ for launch in launches]
            evidence["tiles"] = [launch.configuration for launch in launches]
            launches.clear()  # they hold tensors
        else:
            result = form(case)()
        errors = accuracy(result, exact, eager)
        if errors.misplaced:
            raise ValueError(f"{errors.misplaced} NaN or infinities where float64 has none, or the other way round")
        evidence["within the rule"] = errors.passes()
        del result
        timing = self.timer(lambda: form(copied(case)), self.device, int(self.bytes))
        return timing, errors, {**evidence, "repeats": timing.repeats}

    def _recovers(self) -> bool:
        """Whether the device can still be used. Frees what the last form left behind."""
        if self.device.type != "cuda":
            return True
        try:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        except RuntimeError:  # nothing that this process computes from now on would mean anything
            return False
        return True

    def _record(self, provider: Provider, metric: str, p50: float, **fields: Any) -> Record:
        op, dtype, shape, _ = key_of(self.check)
        evidence = {
            "options": self.check.options,
            "where": list(self.check.where),
            "sources": code(),
            **fields.pop("evidence", {}),
        }
        return Record(
            op, provider.name, "forward", dtype, shape, metric, p50, self.machine, evidence=evidence, **fields
        )

    def _not_run(self, provider: Provider, reason: str, *, failed: bool = False) -> Record:
        return self._record(provider, "not run", nan, why=reason, evidence={"failed": [reason]} if failed else {})

    def _records(
        self, provider: Provider, timing: Timing, errors: Accuracy, scale: float, evidence: dict[str, Any]
    ) -> list[Record]:
        seconds = timing.p50 / 1e3
        fraction = self.floor / seconds
        found = [
            self._record(provider, "ms", timing.p50, p20=timing.p20, p80=timing.p80, roofline=fraction,
                         evidence=evidence),
        ]  # fmt: skip
        for metric, amount in (("GB/s", self.bytes / 1e9), ("TFLOP/s", self.flops / 1e12)):
            if amount:
                p20, p50, p80 = speed(amount, timing)
                found.append(self._record(provider, metric, p50, p20=p20, p80=p80, roofline=fraction))
        for metric, error in (("max error", errors.max_error), ("mean error", errors.mean_error)):
            found.append(self._record(provider, metric, error / scale if scale else error))
        return found


def exact_of(case: Case) -> Tensor:
    """`Case.exact`, some images at a time: float64 hidden activations of all of them may be more than there is room."""
    x, *others = case.arguments
    pieces = [replace(case, arguments=(piece, *others)).exact() for piece in x.split(PIECE)]
    return torch.cat(pieces)


def copied(case: Case) -> Case:
    """The same call on tensors of its own."""
    return replace(case, arguments=tuple(argument.clone() for argument in case.arguments))


def failures(records: Iterable[Record]) -> list[str]:
    """What is wrong with our own kernels in these records."""
    found = []
    for record in records:
        what = f"{record.op} {describe_shape(record.shape)} {record.dtype}"
        if record.provider == OURS and record.metric == "not run" and "failed" in record.evidence:
            found.append(f"{what}: {record.why}")
        if record.provider == OURS and record.evidence.get("within the rule") is False:
            found.append(f"{what}: inaccurate, see `effformer verify`")
    return found


# --- as text ----------------------------------------------------------------------------------------------------------

HEAD = (
    f"{'operation':<15}  {'shape':<15}  {'dtype':<8}  {'provider':<18}  {'us':>9}  {'GB/s':>7}  {'TFLOP/s':>7}  "
    f"{'of floor':>8}  {'error':>8}"
)


def lines(records: Sequence[Record]) -> list[str]:
    """A line of the table for each provider of one cell; for ceilings, one for them."""
    if not any("options" in record.evidence for record in records):
        measured = ", ".join(f"{record.op} {record.p50:.4g} {record.metric}" for record in records)
        return [f"ceilings in {records[0].dtype}: {measured}"]
    found = []
    for provider in dict.fromkeys(record.provider for record in records):
        of = {record.metric: record for record in records if record.provider == provider}
        first = next(iter(of.values()))
        start = f"{first.op:<15}  {describe_shape(first.shape):<15}  {first.dtype:<8}  {provider:<18}"
        if "not run" in of:
            found.append(f"{start}  not run: {first.why}")
            continue
        gigabytes, teraflops = (f"{of[name].p50:.4g}" if name in of else "-" for name in ("GB/s", "TFLOP/s"))
        us, error = f"{1e3 * of['ms'].p50:.2f}", f"{of['max error'].p50:.1e}"
        found.append(f"{start}  {us:>9}  {gigabytes:>7}  {teraflops:>7}  {of['ms'].roofline:>8.1%}  {error:>8}")
    return found
