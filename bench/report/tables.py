"""Results as rows of text, and the one table of rows that the terminal, the report and the README share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..measure.records import Machine
from .comparison import Comparison, Result

CPU_RUN = "CPU run: it says nothing about a GPU"
LONG = ("mean error", "compile s", "first call s", "details")  # columns for the report alone
Row = dict[str, str]


def table(rows: Sequence[Mapping[str, str]], leave_out: Sequence[str] = ()) -> str:
    """Rows with the same columns as a Markdown table, aligned for a terminal. Empty columns are left out."""
    kept = [name for name in rows[0] if name not in leave_out and any(row[name] for row in rows)]
    lines = [kept, *([" ".join(row[name].split()).replace("|", "/") for name in kept] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(kept))]
    widths[-1] = len(kept[-1])  # texts of any length stand last
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(text.ljust(width) for text, width in zip(line, widths, strict=True))} |" for line in lines
    )


# --- figures as text --------------------------------------------------------------------------------------------------


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
    """A relative error: 3.1e-3; a missing one is named, since it should stand beside each speed."""
    if value is None:
        return "not measured"
    if not math.isfinite(value) or value == 0:
        return number(value)
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def worst_error(results: Iterable[Result | None]) -> str:
    """The largest error of several results; NaN is larger than any other."""
    found = [result.value("max error") for result in results if result is not None]
    known = [value for value in found if value is not None]
    if not known or len(known) < len(found):
        return error(None)
    return error(max(known, key=lambda value: (math.isnan(value), value)))


def times(ratio: float | None) -> str:
    """A speed-up: 2.51x; 0.87x (slower)."""
    if ratio is None or math.isnan(ratio):
        return number(ratio)
    return f"{ratio:.2f}x" + (" (slower)" if ratio < 1 else "")


def share(fraction: float | None) -> str:
    return "" if fraction is None else "NaN" if math.isnan(fraction) else f"{100 * fraction:.0f}%"


def run_of(machine: Machine) -> str:
    return f"{machine.commit}, {machine.date[:10]}"


def words(value: Any) -> str:
    """Any value of a record's details in words."""
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: "unknown"}[value]
    if isinstance(value, dict):
        return ", ".join(f"{name} {words(item)}" for name, item in value.items())
    if isinstance(value, list):
        return f"[{'; '.join(map(words, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- rows -------------------------------------------------------------------------------------------------------------


def provider_rows(comparison: Comparison) -> list[Row]:
    """A row for each provider; speed-ups are over the baseline, which is marked."""
    of_network = comparison.is_network
    metric, time, scale = ("img/s", "ms p50 (p20 to p80)", 1.0) if of_network else ("ms", "µs p50 (p20 to p80)", 1e3)
    baseline = comparison.baseline(metric)
    rows = []
    for result in comparison.results.values():
        name = result.provider + (" (the baseline)" if result is baseline else "")
        ratio = times(comparison.ratio(result, metric))
        row = {"provider": name, "img/s": number(result.value("img/s")), "x baseline": ratio}
        row |= {time: _spread(result, scale)}
        row |= {metric: number(result.value(metric)) for metric in ("p99 ms", "peak MiB", "GB/s", "TFLOP/s")}
        row |= {"of roofline": share(result.roofline)}
        row |= {metric: error(result.value(metric)) for metric in ("max error", "mean error")}
        row |= {"top-1 agreement": share(result.value("top-1 agreement"))}
        row |= {metric: number(result.value(metric)) for metric in ("compile s", "first call s")}
        if result.not_run is not None:
            row = dict.fromkeys(row, "") | {"provider": name, "img/s" if of_network else time: "not run"}
        details = {name: value for name, value in result.details.items() if name not in ("options", "where")}
        rows.append(row | {"remarks": result.remarks, "details": words(details)})
    return rows


def _spread(result: Result, scale: float) -> str:
    record = result.records.get("ms")
    if record is None:
        return ""
    p20, p50, p80 = (number(value and scale * value) for value in (record.p20, record.p50, record.p80))
    return f"{p50} ({p20} to {p80})" if p20 and p80 else p50


def summary_row(comparison: Comparison) -> Row:
    """Ours beside the baseline of a network. The latency is that of the quickest baseline, which may be another one."""
    ours, baseline, quickest = comparison.ours, comparison.baseline("img/s"), comparison.baseline("ms")

    def both(other: Result | None, metric: str, text: Callable[[float | None], str] = number) -> str:
        theirs = "" if other is None else text(other.value(metric))
        found = "not run" if metric == "img/s" else ""
        if ours is not None and ours.not_run is None:
            found = text(ours.value(metric))
        return f"{theirs} / {found}" if theirs or found else ""

    return {
        "model": comparison.name,
        "dtype": comparison.dtype,
        "size": comparison.size,
        "batch": str(comparison.batch),
        "baseline": "none was measured" if baseline is None else baseline.provider,
        "img/s": both(baseline, "img/s"),
        "speed-up": times(comparison.speedup("img/s")),
        "ms p50": both(quickest, "ms"),
        "ms p99": both(quickest, "p99 ms"),
        "peak MiB": both(baseline, "peak MiB"),
        "max error": both(baseline, "max error", error),
        "top-1 agreement": both(baseline, "top-1 agreement", share),
        "run": run_of(comparison.machine),
        "remarks": comparison.doubts,
    }


def machine_rows(machines: Iterable[Machine]) -> list[Row]:
    """A row for each setup and commit, with the newest date; `machines` are newest first."""
    rows: dict[tuple[Machine, str], Row] = {}
    for machine in machines:
        row = {"device": machine.gpu, "driver": machine.driver, "torch": machine.torch, "Triton": machine.triton,
               "timm": machine.timm, "commit": machine.commit, "date (UTC)": machine.date[:10]}  # fmt: skip
        rows.setdefault((machine.setup, machine.commit), row)
    return list(rows.values())


def as_text(comparison: Comparison) -> str:
    """One comparison for a terminal."""
    shape = "x".join(map(str, comparison.shape))
    title = ", ".join(filter(None, [comparison.op, shape, comparison.dtype, words(comparison.options)]))
    return "\n".join(filter(None, [title, table(provider_rows(comparison), LONG), comparison.doubts]))
