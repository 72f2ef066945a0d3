"""The report's pictures (extra `bench`: matplotlib), made to be read at 800 pixels' width.

Colours are those of Okabe and Ito, which the colour-blind can tell apart; what is not ours is grey.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ...config import PRESETS
from ..measure.roofline import Ceilings, Part, network_parts
from .comparison import Comparison, Measured, Result
from .tables import CPU_RUN, error, number, run_of, share, times

OURS = {"ours frozen": ("#D55E00", "o", 2.4), "ours triton": ("#0072B2", "s", 1.6), "ours eager": ("#56B4E9", "^", 1.6)}
GREY_MARKERS = "DvPX<>*dph"
BLUE, ORANGE = "#0072B2", "#E69F00"
OPERATIONS = {
    "meta4d": ("#0072B2", "o"),
    "conv_mlp": ("#56B4E9", "s"),
    "linear_mlp": ("#009E73", "^"),
    "attention_mixer": ("#D55E00", "D"),
    "bias_attention": ("#CC79A7", "v"),
    "conv_norm": ("#E69F00", "P"),
    "head": ("#000000", "X"),
}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.axisbelow": True,
    "figure.dpi": 100,
    "savefig.dpi": 200,
}
WIDTH = 8.0  # inches


def draw(measured: Measured, folder: Path) -> list[tuple[str, str]]:
    """Write every picture that the results allow into `folder`: (file name, what it shows), in the report's order."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    with plt.rc_context(STYLE):
        for name, text, figure in _pictures(measured):
            figure.savefig(folder / name, metadata={"Software": None})
            plt.close(figure)
            found.append((name, text))
    return found


def _pictures(measured: Measured) -> Iterator[tuple[str, str, Figure]]:
    for (dtype, size), cells in _by_dtype_and_size(measured.backbones):
        for kind, picture in (("speedup", speedup), ("throughput", throughput)):
            figure = picture(cells)
            if figure is not None:
                text = {"speedup": "Speed-up over the baseline", "throughput": "Throughput by batch"}[kind]
                yield f"{kind}-{dtype}-{size}.png", f"{text}, {dtype}, {size}", figure
    for dtype in dict.fromkeys(cell.dtype for cell in measured.kernels):
        ceilings = measured.ceilings.get(dtype)
        if ceilings is None:
            continue
        for network in PRESETS:
            figure = blocks(measured, network, dtype, ceilings)
            if figure is not None:
                yield f"blocks-{network}-{dtype}.png", f"Time by block against its floor, {network}, {dtype}", figure
        figure = roofline(measured, dtype, ceilings)
        if figure is not None:
            yield f"roofline-{dtype}.png", f"Roofline, {dtype}", figure


def _by_dtype_and_size(cells: Sequence[Comparison]) -> Iterator[tuple[tuple[str, str], list[Comparison]]]:
    for key in dict.fromkeys((cell.dtype, cell.size) for cell in cells):
        yield key, [cell for cell in cells if (cell.dtype, cell.size) == key]


def throughput(cells: Sequence[Comparison]) -> Figure | None:
    """Images a second by batch, a panel for each network; the legend gives each rung's largest error."""
    rungs = list(dict.fromkeys(r.provider for cell in cells for r in cell.results.values() if r.ran("img/s")))
    if not rungs:
        return None
    networks = [(name, list(group)) for name, group in groupby(cells, key=lambda cell: cell.op)]
    lines = -(-len(rungs) // 2)
    figure, axes = plt.subplots(1, len(networks), figsize=(WIDTH, 3.4 + 0.19 * lines), squeeze=False)
    styles = _styles(rungs)
    for panel, (name, group) in zip(axes[0], networks, strict=True):
        batches = sorted({cell.batch for cell in group})
        for rung in rungs:
            points = [(c.batch, c.results[rung].value("img/s")) for c in group if _ran(c, rung)]
            if points:
                panel.plot(*zip(*points, strict=True), **styles[rung])
        panel.set(title=name, xlabel="batch", xscale="log", xticks=batches, xticklabels=batches)
        panel.minorticks_off()
        panel.set_xlim(batches[0] / 1.6, batches[-1] * 1.6)
        panel.set_ylim(0, 1.06 * panel.dataLim.y1)  # the fastest one's marker fits, too
        panel.yaxis.set_major_formatter(lambda value, _: f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}")
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes[0][0].set_ylabel("images / s")
    handles = [Line2D([], [], label=f"{rung} ({_errors(cells, rung)})", **styles[rung]) for rung in rungs]
    height = figure.get_figheight()
    figure.legend(
        handles=handles, loc="lower center", ncols=2, frameon=False, bbox_to_anchor=(0.5, 0.4 / height), fontsize=8
    )
    remark = "error: the largest of these batches, relative to the largest value of the float64 result"
    _finish(figure, cells, "Throughput by batch", remark, (0, (0.63 + 0.19 * lines) / height, 1, 1 - 0.4 / height))
    return figure


def _styles(rungs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Ours in colours; the others in greys, the darker the further up the ladder."""
    others = [rung for rung in rungs if rung not in OURS]
    styles: dict[str, dict[str, Any]] = {}
    for index, rung in enumerate(others):
        grey = str(round(0.72 - 0.65 * index / max(len(others) - 1, 1), 2))
        marker = GREY_MARKERS[index % len(GREY_MARKERS)]
        styles[rung] = {"color": grey, "marker": marker, "linewidth": 1.2, "markersize": 4}
    for rung in OURS:
        color, marker, width = OURS[rung]
        styles[rung] = {"color": color, "marker": marker, "linewidth": width, "markersize": 5, "zorder": 3}
    return styles


def _ran(cell: Comparison, rung: str) -> bool:
    return rung in cell.results and cell.results[rung].ran("img/s")


def _errors(cells: Sequence[Comparison], rung: str) -> str:
    found = [cell.results[rung].value("max error") for cell in cells if _ran(cell, rung)]
    if None in found:
        return "error not measured"
    known = [value for value in found if value is not None]
    return f"error {error(max(known, key=lambda value: (value != value, value)))}"


def speedup(cells: Sequence[Comparison]) -> Figure | None:
    """Ours over the baseline: a bar for each network and batch, with the baseline's name and both errors."""
    rows = [(cell, cell.speedup("img/s")) for cell in cells]
    if all(ratio is None for _, ratio in rows):
        return None
    positions: list[float] = []
    networks: dict[str, list[float]] = {}
    for cell, _ in rows:
        gap = 1.0 if cell.op in networks else 1.9
        positions.append((positions[-1] if positions else 0.0) + gap)
        networks.setdefault(cell.op, []).append(positions[-1])
    height = 0.27 * positions[-1] + 1.45
    figure, panel = plt.subplots(figsize=(WIDTH, height))
    reach = max([1.0, *(ratio for _, ratio in rows if ratio is not None and math.isfinite(ratio))])
    across = panel.get_yaxis_transform()
    for (cell, ratio), position in zip(rows, positions, strict=True):
        length = ratio if ratio is not None and math.isfinite(ratio) else 0.0
        panel.barh(position, length, 0.72, color=BLUE if length >= 1 else ORANGE, hatch=None if length >= 1 else "///",
                   edgecolor="white")  # fmt: skip
        panel.text(
            max(length, 1.0) + 0.015 * reach,
            position,
            times(ratio) or "not run",
            va="center",
            weight="bold",
            fontsize=8.5,
        )
        baseline = cell.baseline("img/s")
        panel.text(1.02, position, f"{_name(baseline)}\nerror of ours {_error(cell.ours)}, its {_error(baseline)}",
                   transform=across, va="center", fontsize=7, color="#444444", linespacing=1.05)  # fmt: skip
    for name, found in networks.items():
        panel.text(-0.015, found[0] - 0.85, name, transform=across, weight="bold", va="center", ha="right")
    panel.axvline(1, color="black", linewidth=1)
    panel.set(xlim=(0, 1.45 * reach), ylim=(positions[-1] + 0.6, 0.6))
    panel.set_yticks(positions, [f"batch {cell.batch}" for cell, _ in rows])
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", color="#dddddd", linewidth=0.6)
    panel.set_xlabel("img/s of ours frozen / img/s of the baseline")
    panel.text(1.02, -0.33 / (height - 1.14), "baseline: the fastest of its run", transform=panel.transAxes, fontsize=9)
    _finish(figure, cells, "Speed-up over the baseline")
    figure.subplots_adjust(left=0.175, right=0.6, bottom=0.78 / height, top=1 - 0.36 / height)
    return figure


def _name(result: Result | None) -> str:
    return "" if result is None else result.provider


def _error(result: Result | None) -> str:
    return "not measured" if result is None else error(result.value("max error"))


def blocks(measured: Measured, network: str, dtype: str, ceilings: Ceilings) -> Figure | None:
    """Each part of a network: what its floor is, and what ours takes above it; None where no part was measured.

    At batch 256 if something was measured there, else at the largest batch.
    """
    kernels = [cell for cell in measured.kernels if cell.dtype == dtype]
    batches = sorted({cell.batch for cell in kernels}, key=lambda batch: (batch != 256, -batch))
    for batch in batches:
        parts = network_parts(PRESETS[network], batch, (224, 224), getattr(torch, dtype))
        found = [_of(part, kernels) for part in parts]
        ours = [cell.ours if cell is not None else None for cell in found]
        taken = [r.value("ms") if r is not None and r.ran("ms") else None for r in ours]
        if any(time is not None for time in taken):
            break
    else:
        return None
    figure, panel = plt.subplots(figsize=(WIDTH, 0.3 * len(parts) + 1.75))
    floors = [1e6 * part.count * part.floor(ceilings) for part in parts]
    times_of = [None if time is None else 1e3 * part.count * time for part, time in zip(parts, taken, strict=True)]
    reach = max(filter(None, [*floors, *times_of]))
    for row, (floor, time, result) in enumerate(zip(floors, times_of, ours, strict=True)):
        text = f"floor {number(floor)}, not measured"
        panel.barh(row, floor, 0.7, color="#999999" if time is None else BLUE, hatch="..." if time is None else None,
                   edgecolor="white")  # fmt: skip
        if time is not None:
            panel.barh(row, max(time - floor, 0), 0.7, left=floor, color=ORANGE, edgecolor="white")
            text = f"{number(time)} ({share(floor / time)} of the floor's speed), error {_error(result)}"
        panel.text(max(floor, time or 0) + 0.01 * reach, row, text, va="center", fontsize=8)
    panel.set_yticks(range(len(parts)), [f"{p.name}{f', x {p.count}' if p.count > 1 else ''}" for p in parts])
    panel.set(xlim=(0, 1.65 * reach), ylim=(len(parts) - 0.4, -0.6), xlabel=f"µs in a forward of batch {batch}")
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", color="#dddddd", linewidth=0.6)
    handles = [Patch(color=color) for color in (BLUE, ORANGE)]
    panel.legend(handles, ["floor", "ours, above it"], loc="lower right", bbox_to_anchor=(1, 1), frameon=False, ncols=2)
    known = [(floor, time) for floor, time in zip(floors, times_of, strict=True) if time is not None]
    total = f"{len(known)} of {len(parts)} parts measured: {number(sum(time for _, time in known))} µs, "
    total += f"their floor {number(sum(floor for floor, _ in known))} µs"
    cells = [cell for cell in found if cell is not None]
    _finish(figure, cells, f"{network}: time by block against its floor", total)
    return figure


def _of(part: Part, kernels: Sequence[Comparison]) -> Comparison | None:
    alike = (cell for cell in kernels if (cell.op, cell.shape) == (part.op, part.shape))
    return next((cell for cell in alike if part.options.items() <= cell.options.items()), None)


def roofline(measured: Measured, dtype: str, ceilings: Ceilings) -> Figure | None:
    """Speed by arithmetic intensity: ours, and the fastest other below or above it, for each operation and shape.

    At batch 256 if something was measured there, else at the largest batch. Operations without matrix products have no
    place on it.
    """
    cells = [c for c in measured.kernels if c.dtype == dtype and c.ours is not None and c.ours.ran("TFLOP/s")]
    cells = [c for c in cells if c.op in OPERATIONS and c.ours is not None and c.ours.ran("GB/s")]
    if not cells:
        return None
    batch = min((cell.batch for cell in cells), key=lambda batch: (batch != 256, -batch))
    cells = [cell for cell in cells if cell.batch == batch]
    figure, panel = plt.subplots(figsize=(WIDTH, 5.2))
    intensities, speeds = [], [ceilings.flops / 1e12]
    for cell in cells:
        color, marker = OPERATIONS[cell.op]
        other = cell.baseline("ms")
        own = cell.ours
        assert own is not None
        x, y = _place(own)
        intensities.append(x)
        speeds.append(y)
        if other is not None and other.ran("TFLOP/s"):
            below = other.value("TFLOP/s") or 0.0
            speeds.append(below)
            panel.plot([x, x], [below, y], color=color, linewidth=0.9, alpha=0.7)
            panel.plot(x, below, marker, markersize=6, markerfacecolor="white", markeredgecolor=color)
        panel.plot(x, y, marker, markersize=6.5, color=color, markeredgecolor="white", markeredgewidth=0.5)
    left, right = min(intensities) / 2, max([*intensities, ceilings.flops / ceilings.bandwidth]) * 2
    ridge = ceilings.flops / ceilings.bandwidth
    panel.plot([left, ridge, right], [left * ceilings.bandwidth / 1e12, ceilings.flops / 1e12, ceilings.flops / 1e12],
               color="black", linewidth=1.3, zorder=1)  # fmt: skip
    panel.set(xscale="log", yscale="log", xlim=(left, right), ylim=(min(speeds) / 2, max(speeds) * 2))
    panel.set(xlabel="FLOP / byte, both counted as the floor counts them", ylabel="TFLOP/s")
    panel.text(right, 1.1 * ceilings.flops / 1e12, f"{number(ceilings.flops / 1e12)} TFLOP/s ", ha="right")
    panel.text(
        1.15 * left, 2.2 * left * ceilings.bandwidth / 1e12, f"{number(ceilings.bandwidth / 1e12)} TB/s", ha="left"
    )
    panel.grid(color="#e4e4e4", linewidth=0.5)
    used = dict.fromkeys(cell.op for cell in cells)
    handles = [Line2D([], [], color=OPERATIONS[op][0], marker=OPERATIONS[op][1], linestyle="", label=op) for op in used]
    handles.append(Line2D([], [], color="#666666", marker="o", linestyle="", label="ours"))
    handles.append(
        Line2D([], [], color="#666666", marker="o", markerfacecolor="white", linestyle="", label="fastest other")
    )
    figure.legend(
        handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.4 / 5.2), frameon=False, ncols=5, fontsize=8
    )
    worst = max((cell.ours.value("max error") or 0.0 for cell in cells if cell.ours), default=None)
    remark = f"largest error of ours: {error(worst)}, relative to the largest value of the float64 result"
    _finish(figure, cells, f"Roofline at batch {batch}", remark, (0, 0.9 / 5.2, 1, 1 - 0.4 / 5.2))
    return figure


def _place(result: Result) -> tuple[float, float]:
    speed, traffic = result.value("TFLOP/s") or 0.0, result.value("GB/s") or 0.0
    return 1e3 * speed / traffic, speed


def _finish(
    figure: Figure,
    cells: Sequence[Comparison],
    title: str,
    remark: str = "",
    rect: tuple[float, float, float, float] | None = None,
) -> None:
    """Title, and a caption that says what was measured, where and by which commit; axes go into `rect`."""
    newest = max((cell.machine for cell in cells), key=lambda machine: machine.date)
    sizes = dict.fromkeys(cell.size for cell in cells if cell.op in PRESETS)
    runs = dict.fromkeys(run_of(cell.machine) for cell in cells)
    commits = run_of(newest) if len(runs) == 1 else f"{len(runs)} runs, the newest {run_of(newest)}"
    versions = f"torch {newest.torch}, Triton {newest.triton}, commit {commits}"
    caption = f"{', '.join([newest.gpu, cells[0].dtype, *sizes])}; {versions}"
    height = figure.get_figheight()
    figure.text(0.01, 1 - 0.12 / height, title, fontsize=12, weight="bold", va="top")
    if not newest.is_gpu:
        figure.text(0.99, 1 - 0.14 / height, CPU_RUN, weight="bold", color="#b00020", va="top", ha="right")
    lines = [line for line in (remark, *textwrap.wrap(caption, 130)) if line]
    figure.text(0.01, 0.07 / height, "\n".join(lines), fontsize=7.5, color="#444444")
    low = (0.15 + 0.14 * len(lines)) / height
    figure.tight_layout(rect=rect or (0, low, 1, 1 - 0.4 / height))
