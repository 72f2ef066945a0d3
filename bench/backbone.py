"""Run the ladder: what `effformer bench` does.

A cell (`ladder.Cell`) holds all of its rungs, the baseline's and ours, measured one after another on one machine, and
is written in one piece when the last is through. A run that is cut off leaves whole cells behind, and the next goes on
with the cell that it was at.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..kernels.config import user_file
from .isolation import FailedError, cache_folder, in_process
from .ladder import Cell, Provider, rungs
from .records import Machine, Record, append_records, read_records
from .rung import Figures

FILE = "backbone.jsonl"
MODELS = ("efficientformer_l1", "efficientformer_l3", "efficientformer_l7")
DTYPES = ("bfloat16", "float16", "float32")
FIRST_BATCHES = (256, 1)
LIMIT = 300.0  # seconds a rung may take
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


@functools.cache
def sources() -> dict[str, str]:
    """What figures hold for beside machine and versions: this package's code, and timm.

    The commit is in the records as well, but committing results changes that.
    """
    root, digest = Path(__file__).parent, hashlib.sha256()
    package = Path(sys.modules[__package__.partition(".")[0]].__path__[0])
    names = ("ceilings", "competitor", "evidence", "isolation", "ladder", "roofline", "rung", "timing")
    own = [*(root / f"{name}.py" for name in names), user_file()]  # tiles tuned here count as code
    for path in [*sorted(package.glob("*.py")), *sorted((root / "../kernels").resolve().glob("*.*")), *own]:
        digest.update(path.read_bytes() if path.is_file() else b"")
    try:
        timm = metadata.version("timm")
    except metadata.PackageNotFoundError:
        timm = "none"
    return {"sources": digest.hexdigest()[:16], "timm": timm}


def complete(path: Path, machine: Machine, providers: Sequence[str] | None = None) -> set[Cell]:
    """The cells of a results file that hold all of `providers` (default: all rungs), from one run of this code here."""

    def same(record: Record) -> bool:
        here = replace(machine, date=record.machine.date, commit=record.machine.commit)
        return record.machine == here and record.evidence.items() >= sources().items()

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


class Stopped:
    """A file of rungs that were stopped, beside Inductor's cache: each is begun again once, with what is compiled now.

    Stopped a second time, it is recorded as not run: no cell holds up the rest for good.
    """

    def __init__(self, path: Path, machine: Machine) -> None:
        self.path, self.owner = path, [machine.gpu, machine.torch, machine.triton, sources()]

    def note(self, provider: Provider, cell: Cell) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._line(provider, cell) + "\n")

    def has(self, provider: Provider, cell: Cell) -> bool:
        return self.path.exists() and self._line(provider, cell) in self.path.read_text(encoding="utf-8").splitlines()

    def _line(self, provider: Provider, cell: Cell) -> str:
        return json.dumps([self.owner, provider.name, cell])


@dataclass(frozen=True)
class Outcome:
    """A cell's records, and the names of those of our rungs that failed."""

    cell: Cell
    records: list[Record]
    failed: tuple[str, ...]


def run_cell(
    cell: Cell,
    machine: Machine,
    device: torch.device,
    run: Run,
    deadline: float,
    *,
    stopped: Stopped,
    providers: Sequence[str] | None = None,
    alone: bool = False,
    tell: Callable[[str], object] = lambda line: None,
) -> Outcome | None:
    """Measure a cell; None if the time was over, or a rung is to be begun again.

    Ours frozen comes first, what competes most closely next, and ours frozen again last: how far both differ is how far
    the machine drifted meanwhile.

    Args:
        deadline: of `time.monotonic()`.
        alone: nothing was run before this cell, so that there is no more time for it in another run.
        tell: is told each rung as it starts.
    """
    listed = chosen(cell, providers)
    records: dict[str, list[Record]] = {}
    failed = []
    order = sorted(listed, key=lambda p: (p.whose != "frozen", not p.options, p.options is None))
    base = {**sources(), "order": [provider.name for provider in order]}
    for provider in order:
        reason = provider.unavailable(cell, device)
        if reason is None:
            tell(f"{cell}: {provider.name} ...")
            try:
                figures = _within(run, provider, cell, False, deadline, stopped, alone)
            except TimeOverError:
                return None
            except FailedError as error:
                reason = str(error)
                failed += [provider.name] if provider.whose != "timm" and provider.options is None else []
        if reason is not None:
            records[provider.name] = [
                _record(cell, provider, machine, "not run", float("nan"), why=reason, evidence=base)
            ]
            continue
        records[provider.name] = [
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
    first = next((provider for provider in order if _of(records[provider.name], "ms")), None)
    if first is not None:
        tell(f"{cell}: {first.name}, again ...")
        try:
            again = _within(run, first, cell, True, deadline, stopped, alone)
        except TimeOverError:
            return None
        except FailedError as error:
            records[first.name] = [_drifted(record, None, str(error)) for record in records[first.name]]
        else:
            records[first.name] = [_drifted(record, again, None) for record in records[first.name]]
    return Outcome(cell, [record for provider in listed for record in records[provider.name]], tuple(failed))


def _within(
    run: Run, provider: Provider, cell: Cell, speed_alone: bool, deadline: float, stopped: Stopped, alone: bool
) -> Figures:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeOverError
    try:
        return run(provider, cell, speed_alone, min(LIMIT, left))
    except TimeoutError:
        if left < LIMIT and not alone:
            raise TimeOverError from None
        if not stopped.has(provider, cell):
            stopped.note(provider, cell)
            raise TimeOverError from None
        raise FailedError(f"it took longer than {min(LIMIT, left):.0f} s, twice") from None


def _drifted(record: Record, again: Figures | None, failure: str | None) -> Record:
    """A record of the first rung, with what measuring it again at the end showed."""
    if record.metric not in ("ms", "img/s"):
        return record
    if again is None:
        return replace(record, evidence={**record.evidence, "again": None}, why=f"again at the end: {failure}")
    p50 = again.metrics[record.metric][1]
    drift = p50 / record.p50 - 1
    remark = f"the machine drifted: {drift:+.0%} at the end of the cell" if abs(drift) > DRIFT else None
    why = "; ".join(filter(None, (record.why, remark))) or None
    return replace(record, evidence={**record.evidence, "again": p50, "drift": round(drift, 4)}, why=why)


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
    """Measure cells for about `seconds`, in order; what is through is in the file at `path` before it is yielded.

    Args:
        machine: asked anew for each cell, whose date is what its records share.
        run: measures a rung; by default in a process of its own.
    """
    deadline = time.monotonic() + seconds
    stopped = Stopped(cache_folder().with_name("stopped.jsonl"), machine())
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
        if outcome is None:
            continue  # a rung of this one is to be begun again; the next may fit
        append_records(path, outcome.records)
        yield outcome
