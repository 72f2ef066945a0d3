"""Who is faster than whom: the records of one run at one shape, side by side.

A network's comparison is what was measured at one date: its rungs took turns on one machine. An operation's is what
one machine measured of one state of the code. Figures of two runs are never set against each other.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..measure.network_providers import Cell, rungs, strongest
from ..measure.records import CUT_OFF, Machine, Record, read_records
from ..measure.roofline import Ceilings

BACKBONES, KERNELS = "backbone.jsonl", "kernels.jsonl"
OURS = {BACKBONES: "ours frozen", KERNELS: "ours"}
# Whose fastest is the baseline: timm's rungs; our eager network compiled, which is measured where timm cannot run.
RIVALS = {BACKBONES: ("timm", "ours eager, torch.compile"), KERNELS: ("",)}
HIGHER_IS_BETTER = ("img/s", "GB/s", "TFLOP/s")
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Result:
    """What one provider did: its records by metric."""

    provider: str
    records: dict[str, Record]

    @property
    def not_run(self) -> str | None:
        """Why it was not; None if it was."""
        record = self.records.get("not run")
        return None if record is None else record.why or "no reason was recorded"

    @property
    def evidence(self) -> dict[str, Any]:
        return {name: value for record in self.records.values() for name, value in record.evidence.items()}

    @property
    def roofline(self) -> float | None:
        """Fraction of the floor's speed."""
        found = (record.roofline for record in self.records.values())
        return next((fraction for fraction in found if fraction is not None), None)

    @property
    def remarks(self) -> list[str]:
        """What was recorded beside the figures, such as a machine that drifted or an option that did not act."""
        return list(
            dict.fromkeys(record.why for record in self.records.values() if record.why and self.not_run is None)
        )

    def value(self, metric: str) -> float | None:
        """The figure, which may be NaN; None where it was not measured."""
        record = self.records.get(metric)
        return None if record is None else record.p50

    def ran(self, metric: str) -> bool:
        """Whether the figure is one that can be divided by."""
        value = self.value(metric)
        return value is not None and math.isfinite(value) and value > 0


@dataclass(frozen=True)
class Comparison:
    """Every provider's result at one operation or network, dtype and shape, from one run.

    Attributes:
        file: `BACKBONES` or `KERNELS`, which says who is ours and whose fastest is the baseline.
        machine: the run; its date is that of the newest record.
    """

    file: str
    op: str
    dtype: str
    shape: tuple[int, ...]
    machine: Machine
    results: dict[str, Result]

    @property
    def options(self) -> dict[str, Any]:
        """What an operation was given beside its input's shape."""
        found: dict[str, Any] = next(iter(self.results.values())).evidence.get("options", {})
        return found

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> str:
        """Of a network's images: "224x224"."""
        return "x".join(map(str, self.shape[2:]))

    @property
    def ours(self) -> Result | None:
        return self.results.get(OURS[self.file])

    @property
    def rivals(self) -> list[Result]:
        found = (result for name, result in self.results.items() if name.startswith(RIVALS[self.file]))
        return [result for result in found if result is not self.ours]

    def baseline(self, metric: str) -> Result | None:
        """The fastest rival by this metric."""
        rivals = [rival for rival in self.rivals if rival.ran(metric)]
        best = max if metric in HIGHER_IS_BETTER else min
        return best(rivals, key=lambda rival: rival.value(metric) or math.nan, default=None)

    def speedup(self, metric: str) -> float | None:
        """How many times as fast as the baseline ours is; NaN where our figure is none. None if one is missing."""
        ours, baseline = self.ours, self.baseline(metric)
        if ours is None or baseline is None or ours.value(metric) is None:
            return None
        if not ours.ran(metric):
            return math.nan
        ratio = (ours.value(metric) or math.nan) / (baseline.value(metric) or math.nan)
        return ratio if metric in HIGHER_IS_BETTER else 1 / ratio

    @property
    def doubts(self) -> str:
        """Remarks on ours and the baseline, which whoever reads the speed-up should know; else nothing."""
        concerned = (self.ours, self.baseline("img/s"), self.baseline("ms"))
        found = (f"{result.provider}: {remark}" for result in concerned if result for remark in result.remarks)
        doubts = list(dict.fromkeys(found))
        if self.file == BACKBONES and (missing := [name for name in strongest(self._cell) if not self._ran(name)]):
            doubts.append(f"not measured, so that a rival may be faster yet: {', '.join(missing)}")
        return "; ".join(doubts)

    @property
    def _cell(self) -> Cell:
        return Cell(self.op, self.batch, self.dtype, *self.shape[2:])

    def _ran(self, provider: str) -> bool:
        return provider in self.results and self.results[provider].ran("ms")

    @property
    def has_every_rung(self) -> bool:
        """Whether the ladder was run to its end, and all that is compiled ran: else the baseline may be a weaker one.

        What cannot run at an image size need not have.
        """
        listed = {rung.name for rung in rungs(self._cell)}
        whole = listed <= set(self.results) and not any(CUT_OFF in result.evidence for result in self.results.values())
        return whole and all(self._ran(name) for name in strongest(self._cell))

    @property
    def rank(self) -> tuple[bool, int, str]:
        """Which of several runs counts: one that set ours against a rival, against most of them, the newest."""
        return self.ours is not None and bool(self.rivals), len(self.results), self.machine.date


@dataclass(frozen=True)
class Measured:
    """What a folder of results holds.

    Attributes:
        backbones, kernels: one comparison for each network or operation, dtype and shape: the newest of those in which
            most was set against ours.
        ceilings: by dtype, the newest that were measured beside the kernels.
    """

    folder: Path
    backbones: tuple[Comparison, ...]
    kernels: tuple[Comparison, ...]
    ceilings: dict[str, Ceilings]

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        return self.backbones + self.kernels

    @functools.cached_property
    def machines(self) -> list[Machine]:
        """Those of the comparisons, newest first."""
        found = {comparison.machine for comparison in self.comparisons}
        return sorted(found, key=lambda machine: machine.date, reverse=True)

    @property
    def is_gpu(self) -> bool:
        return all(machine.is_gpu for machine in self.machines)


def measured(folder: Path) -> Measured:
    """What `folder` holds.

    Raises:
        ValueError: if it holds no record, or one that cannot be read.
    """
    backbones, kernels = read_records(folder / BACKBONES), read_records(folder / KERNELS)
    if not backbones and not kernels:
        raise ValueError(f"{folder}: got no record, allowed is a folder with {BACKBONES} or {KERNELS}, as "
                         "`effformer bench` and `effformer bench kernels` write them")  # fmt: skip
    by_date = sorted(kernels, key=lambda record: record.machine.date)
    flops = {record.dtype: 1e12 * record.p50 for record in by_date if record.op == "matmul"}
    bandwidth = {record.dtype: 1e9 * record.p50 for record in by_date if record.op == "copy"}
    ceilings = {dtype: Ceilings(flops[dtype], bandwidth[dtype]) for dtype in flops.keys() & bandwidth.keys()}
    operations = [record for record in kernels if record.op not in ("matmul", "copy")]
    return Measured(folder, comparisons(BACKBONES, backbones), comparisons(KERNELS, operations), ceilings)


def comparisons(file: str, records: Iterable[Record]) -> tuple[Comparison, ...]:
    """One comparison for each network or operation, its options, dtype and shape, from the run of the highest rank."""
    runs: dict[Any, dict[Any, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        # The kernels' runs go on where they stopped: at other dates, when other results have been committed.
        run: Any = record.machine
        if file == KERNELS:
            run = dataclasses.replace(record.machine, date="", commit=""), record.evidence.get("sources")
        runs[name_of(record), options_of(record), record.dtype, record.shape][run].append(record)
    found = [
        max((_comparison(file, run) for run in by_run.values()), key=lambda run: run.rank) for by_run in runs.values()
    ]
    return tuple(sorted(found, key=lambda c: (c.op, _rank(c.dtype), c.shape[1:], c.shape[0])))


def options_of(record: Record) -> str:
    """What beside its shape an operation was given."""
    return json.dumps(record.evidence.get("options", {}), sort_keys=True)


def name_of(record: Record) -> str:
    return record.op if record.mode == "forward" else f"{record.op}, {record.mode}"


def _rank(dtype: str) -> tuple[int, str]:
    return (DTYPES.index(dtype) if dtype in DTYPES else len(DTYPES)), dtype


def _comparison(file: str, run: list[Record]) -> Comparison:
    dates: dict[str, str] = {}
    for record in run:
        dates[record.provider] = max(dates.get(record.provider, ""), record.machine.date)
    results: dict[str, Result] = {}
    for record in run:
        if record.machine.date == dates[record.provider]:
            results.setdefault(record.provider, Result(record.provider, {})).records[record.metric] = record
    newest = max(run, key=lambda record: record.machine.date)
    return Comparison(file, name_of(newest), newest.dtype, newest.shape, newest.machine, results)
