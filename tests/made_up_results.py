"""Made-up figures of benchmarks, as the records of a results folder."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from effformer.bench.measure.network_providers import PROVIDERS
from effformer.bench.measure.records import Machine, Record, append_records
from effformer.bench.report.comparison import NETWORKS, OPERATIONS, ResultsFolder, read_folder

GPU = Machine("Made-up GPU", "1.2", "2.11.0", "3.6.0", "1.0", "code", "aaaaaaaaaaaa", "2026-01-01T00:00:00+00:00")
CPU = replace(GPU, gpu="cpu: Made-up", driver="none")
L1 = "efficientformer_l1"


def network(provider: str, machine: Machine = GPU, *, op: str = L1, dtype: str = "bfloat16", batch: int = 256,
            size: int = 224, details: dict[str, Any] | None = None, **metrics: float) -> list[Record]:  # fmt: skip
    """Records of a provider; keywords are metrics: rate, ms, p99, peak, error, top1. Details are those of "ms"."""
    names = {"rate": "img/s", "p99": "p99 ms", "peak": "peak MiB", "error": "max error", "top1": "top-1 agreement"}
    shape = (batch, 3, size, size)
    return [
        Record(op, provider, "forward", dtype, shape, names.get(name, name), value, machine,
               details=details or {} if name == "ms" else {})
        for name, value in metrics.items()
    ]  # fmt: skip


def not_run(provider: str, why: str, machine: Machine = GPU) -> Record:
    return Record(L1, provider, "forward", "bfloat16", (256, 3, 224, 224), "not run", math.nan, machine, why=why)


def whole(
    ours: float, machine: Machine = GPU, *, batch: int = 256, op: str = L1, dtype: str = "bfloat16"
) -> list[Record]:
    """Every provider: timm's at 100 img/s and 10 ms, ours frozen so many times as fast and measured again."""
    found = []
    for provider in PROVIDERS:
        speed = ours if provider.name == "ours frozen" else 1.0
        details = {"again": 10 / speed, "compile options": {"max_autotune": True}}
        found += network(provider.name, machine, op=op, dtype=dtype, batch=batch, details=details, rate=100 * speed,
                         ms=10 / speed, p99=11 / speed, peak=200, error=1e-3, top1=0.99)  # fmt: skip
    return found


def kernel(provider: str, ms: float, machine: Machine = GPU, *, op: str = "meta4d", shape: tuple[int, ...] = (256, 48, 56, 56),
           roofline: float | None = None, options: dict[str, Any] | None = None) -> list[Record]:  # fmt: skip
    figures = {"ms": ms, "TFLOP/s": 100 / ms, "GB/s": 1000 / ms, "max error": 2e-3}
    details = {"options": options or {}}
    return [
        Record(op, provider, "forward", "bfloat16", shape, metric, value, machine, details=details, roofline=roofline)
        for metric, value in figures.items()
    ]


def results(folder: Path, networks: list[Record], operations: list[Record] | None = None) -> ResultsFolder:
    for name, records in ((NETWORKS, networks), (OPERATIONS, operations or [])):
        if records:
            append_records(folder / name, records)
    return read_folder(folder)
