"""Results side by side: all providers at one operation or network, dtype and shape, on one setup.

A setup is a machine with its versions and the code. Figures of two setups are never compared.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..measure import networks, operations
from ..measure.network_providers import BY_NAME, Measurement, providers_of, strongest
from ..measure.operation_providers import OURS
from ..measure.records import Key, Machine, Record, read_records
from ..measure.roofline import Ceilings

NETWORKS, OPERATIONS = networks.FILE, operations.FILE
HIGHER_IS_BETTER = ("img/s", "GB/s", "TFLOP/s")
FROZEN = "ours frozen"


@dataclass(frozen=True)
class Result:
    """The records of one provider, by metric."""

    provider: str
    records: dict[str, Record]

    @property
    def not_run(self) -> str | None:
        """Why it was not run; None if it was."""
        record = self.records.get("not run")
        return None if record is None else record.why or "no reason was recorded"

    @property
    def details(self) -> dict[str, Any]:
        return {name: value for record in self.records.values() for name, value in record.details.items()}

    @property
    def roofline(self) -> float | None:
        """The fraction of the roofline's speed."""
        return next((record.roofline for record in self.records.values() if record.roofline is not None), None)

    @property
    def remarks(self) -> str:
        """The reason why it was not run, or remarks such as a drift of the machine; else nothing."""
        found = dict.fromkeys(record.why for record in self.records.values() if record.why)
        return self.not_run or "; ".join(map(str, found))

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
    """Every provider's result at one operation or network, dtype and shape, on one setup.

    Attributes:
        key: of the measurement.
        machine: the setup, with commit and date of the newest record.
        results: by provider.
    """

    key: Key
    machine: Machine
    results: dict[str, Result]

    @property
    def op(self) -> str:
        return self.key[0]

    @property
    def name(self) -> str:
        """The operation, or a network's short name such as "L1"."""
        return self.op.removeprefix("efficientformer_").upper() if self.is_network else self.op

    @property
    def dtype(self) -> str:
        return self.key[2]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.key[3]

    @property
    def options(self) -> dict[str, Any]:
        """An operation's options beside its input's shape."""
        found: dict[str, Any] = json.loads(self.key[4])
        return found

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> str:
        """Of a network's images: "224x224"."""
        return "x".join(map(str, self.shape[2:]))

    @property
    def is_network(self) -> bool:
        return self.op in networks.MODELS

    @property
    def ours(self) -> Result | None:
        return self.results.get(FROZEN if self.is_network else OURS)

    @property
    def others(self) -> list[Result]:
        """The results of which the fastest is the baseline; for a network timm's, or ours eager compiled."""
        if not self.is_network:
            return [result for name, result in self.results.items() if name != OURS]
        return [result for name, result in self.results.items() if name in BY_NAME and BY_NAME[name].is_baseline]

    def baseline(self, metric: str) -> Result | None:
        """The fastest of the others by this metric."""
        best = max if metric in HIGHER_IS_BETTER else min
        others = [other for other in self.others if other.ran(metric)]
        return best(others, key=lambda other: other.value(metric) or math.nan, default=None)

    def ratio(self, result: Result | None, metric: str) -> float | None:
        """How many times as fast as the baseline `result` is; NaN where its figure is. None if one is missing."""
        baseline = self.baseline(metric)
        if result is None or baseline is None or result.value(metric) is None:
            return None
        if not result.ran(metric):
            return math.nan
        ratio = (result.value(metric) or math.nan) / (baseline.value(metric) or math.nan)
        return ratio if metric in HIGHER_IS_BETTER else 1 / ratio

    def speedup(self, metric: str) -> float | None:
        """How many times as fast as the baseline ours is."""
        return self.ratio(self.ours, metric)

    @property
    def doubts(self) -> str:
        """Remarks on ours and the baseline, and compiled baselines without a figure: to know with the speed-up."""
        concerned = (self.ours, self.baseline("img/s"), self.baseline("ms"))
        found = [f"{one.provider}: {one.remarks}" for one in concerned if one and one.remarks and not one.not_run]
        if self.missing:
            found.append(f"not measured, so that a baseline may be faster yet: {', '.join(self.missing)}")
        return "; ".join(dict.fromkeys(found))

    @property
    def missing(self) -> list[str]:
        """The compiled baselines of a network without a figure."""
        names = strongest(self._measurement) if self.is_network else []
        return [name for name in names if name not in self.results or not self.results[name].ran("ms")]

    @property
    def is_whole(self) -> bool:
        """Whether every provider of a network was tried, all compiled baselines ran, and ours was measured again."""
        names = {provider.name for provider in providers_of(self._measurement)}
        drift = self.ours is not None and (self.ours.not_run is not None or "again" in self.ours.details)
        return drift and names <= set(self.results) and not self.missing

    @property
    def _measurement(self) -> Measurement:
        return Measurement(self.op, self.batch, self.dtype, *self.shape[2:])


@dataclass(frozen=True)
class ResultsFolder:
    """The results of one GPU.

    Attributes:
        networks, operations: one comparison for each network or operation, dtype and shape, by `compare`.
        ceilings: by dtype, the newest.
    """

    folder: Path
    networks: tuple[Comparison, ...]
    operations: tuple[Comparison, ...]
    ceilings: dict[str, Ceilings]

    @property
    def machines(self) -> list[Machine]:
        """Those of the comparisons, newest first."""
        found = {comparison.machine for comparison in self.networks + self.operations}
        return sorted(found, key=lambda machine: machine.date, reverse=True)

    @property
    def is_gpu(self) -> bool:
        return all(machine.is_gpu for machine in self.machines)


def read_folder(folder: Path) -> ResultsFolder:
    """The results in `folder`.

    Raises:
        ValueError: if it holds no record, or one that cannot be read.
    """
    of_networks, of_operations = read_records(folder / NETWORKS), read_records(folder / OPERATIONS)
    if not of_networks and not of_operations:
        raise ValueError(f"{folder}: got no record, allowed is a folder with {NETWORKS} or {OPERATIONS}, as "
                         "`effformer bench` and `effformer bench kernels` write them")  # fmt: skip
    by_date = sorted(of_operations, key=lambda record: record.machine.date)
    flops = {record.dtype: 1e12 * record.p50 for record in by_date if record.op == "matmul"}
    bandwidth = {record.dtype: 1e9 * record.p50 for record in by_date if record.op == "copy"}
    ceilings = {dtype: Ceilings(flops[dtype], bandwidth[dtype]) for dtype in flops.keys() & bandwidth.keys()}
    compared = [record for record in of_operations if record.op not in ("matmul", "copy")]
    return ResultsFolder(folder, compare(of_networks), compare(compared), ceilings)


def compare(records: Iterable[Record]) -> tuple[Comparison, ...]:
    """One comparison for each measurement. Later records replace earlier ones.

    Of several setups one with ours and a baseline counts, of these that with the most providers, then the newest.
    """
    measurements: dict[Key, dict[Machine, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.metric != "begun":
            measurements[record.key][record.machine.setup].append(record)
    found = []
    for key, runs in measurements.items():
        setups = []
        for run in runs.values():
            results: dict[str, Result] = {}
            for record in run:
                results.setdefault(record.provider, Result(record.provider, {})).records[record.metric] = record
            newest = max((record.machine for record in run), key=lambda machine: machine.date)
            setups.append(Comparison(key, newest, results))
        found.append(max(setups, key=lambda one: (bool(one.ours and one.others), len(one.results), one.machine.date)))
    return tuple(sorted(found, key=lambda one: (one.op, networks.DTYPES.index(one.dtype), one.shape[1:], one.batch)))
