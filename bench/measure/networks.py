"""Run the ladder: what `effformer bench` does.

A cell (`ladder.Cell`) holds all of its rungs, the baseline's and ours, measured one after another on one machine, and
is written in one piece when the last is through. Where the time is over before, what there is of it is written, if that
sets ours against a rival, and marked "cut off"; the next run measures the whole cell.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .network_providers import BY_NAME, Cell, Provider, rungs
from .network_run import Figures
from .process import FailedError, cache_folder, in_process
from .records import CUT_OFF, Machine, Record, append_records, read_records
from .resume import Attempts, sources

FILE = "backbone.jsonl"
MODELS = ("efficientformer_l1", "efficientformer_l3", "efficientformer_l7")
DTYPES = ("bfloat16", "float16", "float32")
FIRST_BATCHES = (256, 1)
LIMIT = 400.0  # seconds a rung may take
LEAST = 45.0  # seconds worth starting a cell for
DRIFT = 0.05  # between the first rung's time and the same at the end, beyond which the cell says so


class TimeOverError(Exception):
    """The time was over while a rung ran."""


# (rung, cell, its figures' speed alone, seconds that it may take) -> what came of it
Run = Callable[[Provider, Cell, bool, float], Figures]


def in_order(
    models: Sequence[str], batches: Sequence[int], dtypes: Sequence[str], sizes: Sequence[tuple[int, int]]
) -> list[Cell]:
    """All cells, the most telling first.

    Image sizes as given, of each bfloat16 first, of each batches 256 and 1 before others, of each the smallest model.
    """

    def place(cell: Cell) -> tuple[int, ...]:
        size, batch = sizes.index((cell.height, cell.width)), batches.index(cell.batch)
        first = FIRST_BATCHES.index(cell.batch) if cell.batch in FIRST_BATCHES else None
        late = (1, batch, MODELS.index(cell.model)) if first is None else (0, MODELS.index(cell.model), first)
        return (size, DTYPES.index(cell.dtype), *late)

    found = itertools.product(models, batches, dtypes, sizes)
    return sorted({Cell(model, batch, dtype, *size) for model, batch, dtype, size in found}, key=place)


# --- what is there already --------------------------------------------------------------------------------------------


def known() -> dict[str, str]:
    """What figures hold for beside machine and versions: the code that they are of, and timm."""
    try:
        timm = metadata.version("timm")
    except metadata.PackageNotFoundError:
        timm = "none"
    return {"sources": sources(), "timm": timm}


def complete(path: Path, machine: Machine, providers: Sequence[str] | None = None) -> set[Cell]:
    """The cells of a results file that hold all of `providers` (default: all rungs), from one run of this code here."""

    def same(record: Record) -> bool:
        here = replace(machine, date=record.machine.date, commit=record.machine.commit)
        whole = CUT_OFF not in record.evidence
        return whole and record.machine == here and record.evidence.items() >= known().items()

    found: dict[tuple[Cell, str], set[str]] = defaultdict(set)
    for record in read_records(path):
        if record.metric in ("ms", "not run") and same(record):
            cell = Cell(record.op, record.shape[0], record.dtype, *record.shape[2:])
            found[cell, record.machine.date].add(record.provider)
    return {cell for (cell, _), names in found.items() if names >= {p.name for p in chosen(cell, providers)}}


def chosen(cell: Cell, providers: Sequence[str] | None) -> list[Provider]:
    """The rungs of a cell that were asked for, in the order in which they are listed."""
    return [provider for provider in rungs(cell) if providers is None or provider.name in providers]


# --- running ----------------------------------------------------------------------------------------------------------


def stopped_rungs(machine: Machine) -> Attempts:
    """The rungs that were stopped, beside Inductor's cache: each is begun again once, with what is compiled now.

    Stopped a second time, it is recorded as not run: no cell holds up the rest for good.
    """
    return Attempts(cache_folder().with_name("stopped.jsonl"), machine, known())


@dataclass(frozen=True)
class Outcome:
    """What came of a cell.

    Attributes:
        records: of its rungs; where it is not whole, of those that were through when the time was over.
        failed: rungs that raised, crashed or took too long.
        whole: whether all rungs are through; one that is not is to be measured again.
    """

    cell: Cell
    records: list[Record]
    failed: tuple[str, ...]
    whole: bool


def run_cell(
    cell: Cell,
    machine: Machine,
    device: torch.device,
    run: Run,
    deadline: float,
    *,
    stopped: Attempts,
    providers: Sequence[str] | None = None,
    alone: bool = False,
    tell: Callable[[str], object] = lambda line: None,
) -> Outcome:
    """Measure a cell, until the time is over or a rung is to be begun again.

    Ours frozen comes first, what competes most closely next, and ours frozen again last. The slower of both counts, so
    that a machine that drifts does no rival wrong; how far they differ is recorded.

    Args:
        deadline: of `time.monotonic()`.
        stopped: see `stopped_rungs`.
        alone: nothing was run before this cell, so that there is no more time for it in another run.
        tell: is told each rung as it starts.
    """
    listed = chosen(cell, providers)
    records: dict[str, list[Record]] = {}
    failed: list[str] = []
    order = sorted(listed, key=lambda p: (p.whose != "frozen", not p.options, p.options is None))
    base = {**known(), "order": [provider.name for provider in order]}

    def measured(provider: Provider, speed_alone: bool) -> Figures:
        tell(f"{cell}: {provider.name}{', again' if speed_alone else ''} ...")
        try:
            return _within(run, provider, cell, speed_alone, deadline, stopped, alone)
        except FailedError:
            failed.append(provider.name)
            raise

    def listed_records() -> list[Record]:
        return [record for provider in listed for record in records.get(provider.name, ())]

    try:
        for provider in order:
            reason = provider.unavailable(cell, device)
            if reason is None:
                try:
                    records[provider.name] = _records(cell, provider, machine, measured(provider, False), base)
                except FailedError as error:
                    reason = str(error)
            if reason is not None:
                records[provider.name] = [
                    _record(cell, provider, machine, "not run", float("nan"), why=reason, evidence=base)
                ]
        first = next((provider for provider in order if _of(records[provider.name], "ms")), None)
        if first is not None:
            try:
                again, failure = measured(first, True), None
            except FailedError as error:
                again, failure = None, str(error)
            records[first.name] = [_drifted(record, again, failure) for record in records[first.name]]
    except TimeOverError:
        parts = [
            replace(record, evidence={**record.evidence, CUT_OFF: True}) if record.evidence else record
            for record in listed_records()
        ]
        return Outcome(cell, parts, tuple(failed), whole=False)
    return Outcome(cell, listed_records(), tuple(failed), whole=True)


def _within(
    run: Run, provider: Provider, cell: Cell, speed_alone: bool, deadline: float, stopped: Attempts, alone: bool
) -> Figures:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeOverError
    try:
        return run(provider, cell, speed_alone, min(LIMIT, left))
    except TimeoutError:
        if left < LIMIT and not alone:
            raise TimeOverError from None
        if not stopped.count(provider.name, cell):
            stopped.add(provider.name, cell)
            raise TimeOverError from None
        raise FailedError(f"it took longer than {min(LIMIT, left):.0f} s, twice") from None


def _records(cell: Cell, provider: Provider, machine: Machine, figures: Figures, base: dict[str, Any]) -> list[Record]:
    return [
        _record(
            cell,
            provider,
            machine,
            metric,
            p50,
            p20=p20,
            p80=p80,
            roofline=floor_share(figures, cell, metric, p50),
            why="; ".join(figures.doubts) or None,
            evidence={**base, **figures.evidence} if metric == "ms" else {},
        )
        for metric, (p20, p50, p80) in figures.metrics.items()
    ]


def _drifted(record: Record, again: Figures | None, failure: str | None) -> Record:
    """The slower of the first rung's record and what measuring it again at the end showed."""
    if record.metric not in ("ms", "p99 ms", "img/s"):
        return record
    if again is None:
        return replace(record, evidence={**record.evidence, "again": None}, why=f"again at the end: {failure}")
    p20, p50, p80 = again.metrics[record.metric]
    ratio = p50 / record.p50
    remark = f"the machine drifted: {ratio - 1:+.0%} at the end of the cell" if abs(ratio - 1) > DRIFT else None
    found = replace(
        record,
        evidence={**record.evidence, "first": record.p50, "again": p50, "drift": round(ratio - 1, 4)},
        why="; ".join(filter(None, (record.why, remark))) or None,
    )
    slowdown = 1 / ratio if record.metric == "img/s" else ratio
    if slowdown <= 1:
        return found
    return replace(found, p20=p20, p50=p50, p80=p80, roofline=record.roofline and record.roofline / slowdown)


def floor_share(figures: Figures, cell: Cell, metric: str, p50: float) -> float | None:
    """Fraction of the floor's speed, by ceilings measured in the same process; of ours frozen alone."""
    floor: float | None = figures.evidence.get("floor ms")
    if floor is None or metric not in ("ms", "img/s"):
        return None
    return floor / p50 if metric == "ms" else floor * p50 / (1e3 * cell.batch)


def _record(cell: Cell, provider: Provider, machine: Machine, metric: str, p50: float, **more: Any) -> Record:
    return Record(cell.model, provider.name, "forward", cell.dtype, cell.shape, metric, p50, machine, **more)


def _of(records: Sequence[Record], metric: str) -> Record | None:
    return next((record for record in records if record.metric == metric), None)


def run_ladder(
    todo: Sequence[Cell],
    path: Path,
    machine: Callable[[], Machine],
    device: torch.device,
    seconds: float,
    *,
    run: Run | None = None,
    providers: Sequence[str] | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> Iterator[Outcome]:
    """Measure cells for about `seconds`, in order; what came of one is in the file at `path` before it is yielded.

    Args:
        machine: asked anew for each cell, whose date is what its records share.
        run: measures a rung; by default in a process of its own.
    """
    deadline = time.monotonic() + seconds
    stopped = stopped_rungs(machine())
    for number, cell in enumerate(todo):
        if number and deadline - time.monotonic() < LEAST:
            return
        outcome = run_cell(
            cell,
            machine(),
            device,
            run or functools.partial(in_process, device=device),
            deadline,
            stopped=stopped,
            providers=providers,
            alone=number == 0,
            tell=tell,
        )
        if outcome.whole or _compares(outcome):
            append_records(path, outcome.records)
            yield outcome


def _compares(outcome: Outcome) -> bool:
    """Whether it sets ours frozen against a rival."""
    ran = {record.provider for record in outcome.records if record.metric == "ms"}
    ours = {provider.name for provider in rungs(outcome.cell) if provider.whose == "frozen"}
    return bool(ran & ours) and any(BY_NAME[name].is_rival for name in ran)
