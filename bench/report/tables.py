"""The benchmark's results as tables: speeds with the errors beside them, losses like wins, what was not run and why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..measure.records import CUT_OFF, Machine
from .comparison import Comparison, Measured, Result

CPU_RUN = "CPU run: it says nothing about a GPU"

SHARED = ("timm", "sources", "order", CUT_OFF)  # evidence that all rungs of a comparison have in common


@dataclass(frozen=True)
class Table:
    """Text in rows, each as long as the header."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    remark: str = ""


def number(value: float | None, digits: int = 3) -> str:
    """`value` for people: 12,346, 1.23, 0.0123; "NaN" and infinities as such; nothing for None."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{value:+}"
    if value == 0:
        return "0"
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{decimals}f}"


def error(value: float | None) -> str:
    """A relative error: 3.1e-3; what is missing beside a speed is said to be."""
    if value is None:
        return "not measured"
    if not math.isfinite(value) or value == 0:
        return number(value)
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def times(ratio: float | None) -> str:
    """A speed-up: 2.51x; 0.87x (slower)."""
    if ratio is None or math.isnan(ratio):
        return number(ratio)
    return f"{ratio:.2f}x" + (" (slower)" if ratio < 1 else "")


def share(fraction: float | None) -> str:
    return "" if fraction is None else "NaN" if math.isnan(fraction) else f"{100 * fraction:.0f}%"


def shape_of(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def run_of(machine: Machine) -> str:
    return f"{machine.commit}, {machine.date[:10]}"


def machine_table(machines: Iterable[Machine]) -> Table:
    header = ("GPU" if all(machine.is_gpu for machine in machines) else "device", "driver", "torch", "Triton", "commit")
    dates: dict[tuple[str, ...], list[str]] = {}
    for machine in machines:
        setup = (machine.gpu, machine.driver, machine.torch, machine.triton, machine.commit)
        dates.setdefault(setup, []).append(machine.date[:10])
    rows = [(*setup, min(days) + ("" if len(set(days)) == 1 else f" to {max(days)}")) for setup, days in dates.items()]
    return Table("Measured on", (*header, "date (UTC)"), tuple(rows))


def summary_tables(measured: Measured) -> Iterator[Table]:
    """For each network ours against the baseline."""
    header = (
        "dtype", "size", "batch", "baseline", "its img/s", "ours, img/s", "speed-up", "its p50 (p99), ms",
        "ours, ms", "its peak, MiB", "ours, MiB", "its max error", "ours, max error", "its top-1 agreement",
        "ours, top-1", "remarks", "run",
    )  # fmt: skip
    for network, cells in groupby(measured.backbones, key=lambda cell: cell.op):
        yield Table(
            network,
            header,
            tuple(_summary(cell) for cell in cells),
            "The baseline is the fastest of timm's rungs in the same run; where timm cannot run, of our own eager "
            "network compiled. Its latency is that of the rung with the shortest, which is named where it is another "
            "one. Errors are relative to the largest value of the float64 result, top-1 agreement is with float32.",
        )


def _summary(cell: Comparison) -> tuple[str, ...]:
    ours, baseline = cell.ours, cell.baseline("img/s")
    quickest = cell.baseline("ms")
    latency = _latency(quickest)
    if quickest is not None and baseline is not None and quickest.provider != baseline.provider:
        latency += f", {quickest.provider}"
    reason = "not run" if ours is None or ours.not_run is not None else None
    return (
        cell.dtype,
        cell.size,
        str(cell.batch),
        "none was measured" if baseline is None else baseline.provider,
        number(_value(baseline, "img/s")),
        reason or number(_value(ours, "img/s")),
        times(cell.speedup("img/s")),
        latency,
        reason or _latency(ours),
        number(_value(baseline, "peak MiB")),
        number(_value(ours, "peak MiB")),
        "" if baseline is None else error(baseline.value("max error")),
        "" if reason or ours is None else error(ours.value("max error")),
        share(_value(baseline, "top-1 agreement")),
        share(_value(ours, "top-1 agreement")),
        cell.doubts,
        run_of(cell.machine),
    )


def _value(result: Result | None, metric: str) -> float | None:
    return None if result is None else result.value(metric)


def _latency(result: Result | None) -> str:
    if result is None or result.value("ms") is None:
        return ""
    tail = result.value("p99 ms")
    return number(result.value("ms")) + ("" if tail is None else f" ({number(tail)})")


def ladder_table(cell: Comparison) -> Table:
    """Every rung of one comparison of networks."""
    header = (
        "rung", "img/s", "x baseline", "ms p50 (p20 to p80)", "p99 ms", "of the floor", "peak MiB", "max error",
        "mean error", "top-1 agreement", "compile s", "first call s", "evidence",
    )  # fmt: skip
    baseline = cell.baseline("img/s")
    rows = []
    for result in cell.results.values():
        if result.not_run is not None:
            rows.append((result.provider, "not run", *[""] * 10, result.not_run))
            continue
        ratio = None
        if baseline is not None and result.value("img/s") is not None:
            ratio = (result.value("img/s") or math.nan) / (baseline.value("img/s") or math.nan)
        rows.append((
            result.provider + (" (the baseline)" if result is baseline else ""),
            number(result.value("img/s")),
            times(ratio),
            _spread(result),
            number(result.value("p99 ms")),
            share(result.roofline),
            number(result.value("peak MiB")),
            error(result.value("max error")),
            error(result.value("mean error")),
            share(result.value("top-1 agreement")),
            number(result.value("compile s")),
            number(result.value("first call s")),
            evidence_of(result),
        ))  # fmt: skip
    title = f"{cell.op}, batch {cell.batch}, {cell.dtype}, {cell.size}"
    shared = next(iter(cell.results.values())).evidence
    remark = [f"Run: {run_of(cell.machine)}", *(f"{name}: {_words(shared[name])}" for name in SHARED if name in shared)]
    return Table(title, header, tuple(rows), "; ".join(remark) + ".")


def _spread(result: Result, scale: float = 1.0) -> str:
    record = result.records.get("ms")
    if record is None:
        return ""
    if record.p20 is None or record.p80 is None:
        return number(scale * record.p50)
    return f"{number(scale * record.p50)} ({number(scale * record.p20)} to {number(scale * record.p80)})"


def evidence_of(result: Result) -> str:
    """What shows that a provider's options acted, and remarks: "kernels 31, graph yes"."""
    found = [f"{name} {_words(value)}" for name, value in result.evidence.items() if name not in (*SHARED, "options")]
    return ", ".join([*found, *result.remarks])


def _words(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: "unknown"}[value]
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(item)}" for name, item in value.items())
    if isinstance(value, list):
        return f"[{'; '.join(map(_words, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def kernel_tables(measured: Measured) -> Iterator[Table]:
    """For each operation every provider at every shape."""
    header = (
        "dtype", "shape", "provider", "µs p50 (p20 to p80)", "x the fastest other", "GB/s", "TFLOP/s", "of the floor",
        "max error", "mean error", "evidence", "run",
    )  # fmt: skip
    for operation, cells in groupby(measured.kernels, key=lambda cell: cell.op):
        rows = []
        for cell in cells:
            for result in cell.results.values():
                shape = ", ".join(filter(None, [shape_of(cell.shape), _words(cell.options)]))
                label = (cell.dtype, shape, result.provider)
                if result.not_run is not None:
                    rows.append((*label, "not run", *[""] * 6, result.not_run, run_of(cell.machine)))
                    continue
                rows.append((
                    *label,
                    _spread(result, 1e3),
                    times(cell.speedup("ms")) if result is cell.ours else "",
                    number(result.value("GB/s")),
                    number(result.value("TFLOP/s")),
                    share(result.roofline),
                    error(result.value("max error")),
                    error(result.value("mean error")),
                    evidence_of(result),
                    run_of(cell.machine),
                ))  # fmt: skip
        yield Table(operation, header, tuple(rows))
