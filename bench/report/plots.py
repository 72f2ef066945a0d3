"""The report's pictures (extra `bench`: matplotlib), made to be read at 800 pixels' width.

Colours are those of Okabe and Ito, which the colour-blind can distinguish. Ours is blue.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
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
from ...files import write_whole
from ...workload import Work
from ..measure.roofline import Ceilings, network_parts
from .comparison import Comparison, Result, ResultsFolder
from .tables import CPU_RUN, number, run_of, share, times, worst_error

BLUE, SKY, GREEN, ORANGE, GREY, BLACK = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#999999", "#000000"
# Lines of the throughput: label, the names of its providers, of which the fastest counts, and its style.
LINES: tuple[tuple[str, Callable[[str], bool], dict[str, Any]], ...] = (
    ("effformer, frozen", lambda name: name == "ours frozen", {"color": BLUE, "marker": "o", "linewidth": 2.4}),
    ("effformer, live", lambda name: name == "ours triton", {"color": SKY, "marker": "s"}),
    ("effformer, eager", lambda name: name == "ours eager", {"color": GREEN, "marker": "^"}),
    ("timm, compiled", lambda name: name.startswith("timm torch.compile"), {"color": BLACK, "marker": "D"}),
    ("timm, eager", lambda name: name.startswith("timm eager"), {"color": GREY, "marker": "v"}),
    ("effformer eager, compiled", lambda name: name.startswith("ours eager,"), {"color": ORANGE, "marker": "P"}),
)
OPERATIONS: dict[str, dict[str, Any]] = {
    "meta4d": {"color": BLUE, "marker": "o"},
    "conv_mlp": {"color": SKY, "marker": "s"},
    "linear_mlp": {"color": GREEN, "marker": "^"},
    "attention_mixer": {"color": GREY, "marker": "D"},
    "bias_attention": {"color": "#CC79A7", "marker": "v"},
    "conv_norm": {"color": ORANGE, "marker": "P"},
    "head": {"color": BLACK, "marker": "X"},
}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "savefig.dpi": 200,
}
WIDTH = 8.0  # inches


def draw(results: ResultsFolder, folder: Path) -> list[tuple[str, str]]:
    """Write every picture that the results allow into `folder`: (file name, title), in the report's order.

    Raises:
        OSError: naming the picture that cannot be written.
    """
    found = []
    with plt.rc_context(STYLE):
        for name, title, figure in _pictures(results):
            if figure is not None:
                picture = io.BytesIO()
                figure.savefig(picture, format="png", metadata={"Software": None})
                plt.close(figure)
                write_whole(folder / name, picture.getbuffer())
                found.append((name, title))
    return found


def _pictures(results: ResultsFolder) -> Iterator[tuple[str, str, Figure | None]]:
    """(file name, title, figure or None where the results allow none); the speed-up comes first."""
    by_size = dict.fromkeys((one.dtype, one.size) for one in results.networks)
    for kind, title, picture in (
        ("speedup", "Speed-up over the baseline", speedup),
        ("throughput", "Throughput by batch", throughput),
    ):
        for dtype, size in by_size:
            alike = [one for one in results.networks if (one.dtype, one.size) == (dtype, size)]
            yield f"{kind}-{dtype}-{size}.png", f"{title}, {dtype}, {size}", picture(alike, title)
    for dtype in dict.fromkeys(one.dtype for one in results.operations):
        if ceilings := results.ceilings.get(dtype):
            alike = [one for one in results.operations if one.dtype == dtype]
            for network in PRESETS:
                figure = blocks(alike, network, ceilings)
                yield f"blocks-{network}-{dtype}.png", f"Time by block, {network}, {dtype}", figure
            yield f"roofline-{dtype}.png", f"Roofline, {dtype}", roofline(alike, ceilings)


# --- networks ---------------------------------------------------------------------------------------------------------


def throughput(comparisons: Sequence[Comparison], title: str) -> Figure | None:
    """Images a second by batch, a panel for each network; the legend gives the largest error of each line."""
    lines = []
    for label, of, style in LINES:
        if results := [found for one in comparisons if (found := _fastest(one, of))]:
            lines.append((of, style | {"label": f"{label} (error {worst_error(results)})"}))
    if not lines:
        return None
    networks = [(name, list(group)) for name, group in groupby(comparisons, key=lambda one: one.op)]
    figure, axes = plt.subplots(1, len(networks), figsize=(WIDTH, 4.2), squeeze=False)
    for panel, (name, group) in zip(axes[0], networks, strict=True):
        batches = sorted({one.batch for one in group})
        for of, style in lines:
            points = {one.batch: found.value("img/s") for one in group if (found := _fastest(one, of))}
            panel.plot([*points.keys()], [*points.values()], markersize=5, **style)
        panel.set(title=name, xlabel="batch", xscale="log", xticks=batches, xticklabels=batches)
        panel.minorticks_off()
        panel.set_xlim(batches[0] / 1.6, batches[-1] * 1.6)
        panel.set_ylim(0, 1.06 * panel.dataLim.y1)  # the fastest one's marker fits, too
        panel.yaxis.set_major_formatter(lambda value, _: f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}")
        panel.grid(axis="y")
    axes[0][0].set_ylabel("images / s")
    figure.legend(handles=axes[0][0].get_lines(), loc="lower center", ncols=3, bbox_to_anchor=(0.5, 0.09))
    remark = "Of several forms the fastest counts. Errors are relative to the largest value of the float64 result."
    _finish(figure, comparisons, title, remark, legend=0.5)
    return figure


def _fastest(comparison: Comparison, of: Callable[[str], bool]) -> Result | None:
    found = [result for name, result in comparison.results.items() if of(name) and result.ran("img/s")]
    return max(found, key=lambda result: result.value("img/s") or math.nan, default=None)


def speedup(comparisons: Sequence[Comparison], title: str) -> Figure | None:
    """Ours over the baseline: a bar for each network and batch, with the baseline's name and both errors."""
    ratios = [one.speedup("img/s") for one in comparisons]
    if all(ratio is None for ratio in ratios):
        return None
    rows = [max(ratio, 0.0) if ratio is not None and math.isfinite(ratio) else 0.0 for ratio in ratios]
    reach = max([1.0, *rows])
    height = max(0.34 * len(rows), 1) + 1.3
    figure, panel = plt.subplots(figsize=(WIDTH, height))
    across = panel.get_yaxis_transform()
    for row, (one, ratio, length) in enumerate(zip(comparisons, ratios, rows, strict=True)):
        baseline = one.baseline("img/s")
        slower = length < 1
        panel.barh(row, length, 0.72, color=ORANGE if slower else BLUE, hatch="///" if slower else None,
                   edgecolor="white")  # fmt: skip
        panel.text(max(length, 1) + 0.015 * reach, row, times(ratio) or "not run", va="center", weight="bold")
        name = baseline.provider if baseline else "no baseline"
        panel.text(1.02, row, f"{name}\nerror: effformer {worst_error([one.ours])}, baseline {worst_error([baseline])}",
                   transform=across, va="center", fontsize=7, color="#444444", linespacing=1.05)  # fmt: skip
    panel.axvline(1, color="black", linewidth=1)
    panel.set(xlim=(0, 1.45 * reach), ylim=(len(rows) - 0.4, -0.6))
    panel.set_yticks(range(len(rows)), [f"{one.name}, batch {one.batch}" for one in comparisons])
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x")
    panel.set_xlabel("images / s of effformer, frozen, over those of the baseline (on the right)", loc="left")
    _finish(figure, comparisons, title)
    figure.subplots_adjust(left=0.14, right=0.58, bottom=0.78 / height, top=1 - 0.36 / height)
    return figure


# --- operations -------------------------------------------------------------------------------------------------------


def _telling_batch(comparisons: Sequence[Comparison]) -> int:
    """256 if it was measured, else the largest."""
    return min((one.batch for one in comparisons), key=lambda batch: (batch != 256, -batch))


def blocks(operations: Sequence[Comparison], network: str, ceilings: Ceilings) -> Figure | None:
    """Each part of a network: its time at the roofline, and the rest of ours; None where no part was measured."""
    ran = [one for one in operations if one.ours is not None and one.ours.ran("ms")]
    if not ran:
        return None
    batch, dtype = _telling_batch(ran), getattr(torch, ran[0].dtype)
    parts = network_parts(PRESETS[network], batch, (224, 224), dtype)
    found = [next((one for one in ran if _is_of(one, work)), None) for work, _ in parts]
    measured = [one for one in found if one is not None]
    if not measured:
        return None
    figure, panel = plt.subplots(figsize=(WIDTH, 0.3 * len(parts) + 1.75))
    known, reach = [], 0.0  # (least time, our time) of the parts that were measured; the longest bar
    for row, ((work, amounts), one) in enumerate(zip(parts, found, strict=True)):
        low = time = 1e6 * work.count * ceilings.least_time(*amounts)
        text = f" roofline {number(low)}, not measured"
        style: dict[str, Any] = {"color": GREY, "hatch": "..."}
        if one is not None and one.ours is not None:
            time = 1e3 * work.count * (one.ours.value("ms") or math.nan)
            known.append((low, time))
            panel.barh(row, max(time - low, 0), 0.7, left=low, color=ORANGE, edgecolor="white")
            text = f" {number(time)} ({share(low / time)} of the roofline), error {worst_error([one.ours])}"
            style = {"color": BLUE}
        panel.barh(row, low, 0.7, edgecolor="white", **style)
        panel.text(max(low, time), row, text, va="center", fontsize=8)
        reach = max(reach, low, time)
    panel.set_yticks(range(len(parts)), [f"{w.part}{f', x {w.count}' if w.count > 1 else ''}" for w, _ in parts])
    panel.set(xlim=(0, 1.65 * reach), ylim=(len(parts) - 0.4, -0.6), xlabel=f"µs in a forward of batch {batch}")
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x")
    handles = [Patch(color=color) for color in (BLUE, ORANGE)]
    panel.legend(handles, ["at the roofline", "ours, beyond it"], loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    total = f"{len(known)} of {len(parts)} parts measured: {number(sum(time for _, time in known))} µs, "
    total += f"at the roofline {number(sum(low for low, _ in known))} µs"
    _finish(figure, measured, f"{network}: time by block", total)
    return figure


def _is_of(comparison: Comparison, work: Work) -> bool:
    alike = (comparison.op, comparison.shape) == (work.operation, work.shape)
    return alike and work.options.items() <= comparison.options.items()


def roofline(operations: Sequence[Comparison], ceilings: Ceilings) -> Figure | None:
    """Speed by arithmetic intensity: ours, and the fastest other below or above it, for each operation and shape.

    Operations without matrix products have no place on it.
    """
    found = [one for one in operations if one.op in OPERATIONS and one.ours and one.ours.ran("TFLOP/s")]
    if not found:
        return None
    batch = _telling_batch(found)
    found = [one for one in found if one.batch == batch]
    figure, panel = plt.subplots(figsize=(WIDTH, 5.2))
    peak, ridge = ceilings.flops / 1e12, ceilings.flops / ceilings.bandwidth
    intensities, speeds = [ridge], [peak]
    for one in found:
        other, own, style = one.baseline("ms"), one.ours, OPERATIONS[one.op]
        assert own is not None
        y = own.value("TFLOP/s") or 0.0
        x = 1e3 * y / (own.value("GB/s") or math.nan)
        intensities.append(x)
        speeds.append(y)
        if other is not None and other.ran("TFLOP/s"):
            speeds.append(other.value("TFLOP/s") or 0.0)
            panel.plot([x, x], [speeds[-1], y], color=style["color"], linewidth=0.9, alpha=0.7)
            panel.plot(x, speeds[-1], markersize=6, markerfacecolor="white", **style)
        panel.plot(x, y, markersize=6.5, markeredgecolor="white", markeredgewidth=0.5, **style)
    left, right = min(intensities) / 2, max(intensities) * 2
    low = left * ceilings.bandwidth / 1e12
    panel.plot([left, ridge, right], [low, peak, peak], color="black", linewidth=1.3, zorder=1)
    panel.set(xscale="log", yscale="log", xlim=(left, right), ylim=(min(speeds) / 2, max(speeds) * 2))
    panel.set(xlabel="FLOP / byte, the least traffic", ylabel="TFLOP/s")
    panel.text(right, 1.1 * peak, f"{number(peak)} TFLOP/s ", ha="right")
    panel.text(1.15 * left, 2.2 * low, f"{number(ceilings.bandwidth / 1e12)} TB/s", ha="left")
    panel.grid()
    markers = {one.op: OPERATIONS[one.op] for one in found} | {"ours": {"color": GREY, "marker": "o"}}
    markers |= {"fastest other": markers["ours"] | {"markerfacecolor": "white"}}
    handles = [Line2D([], [], linestyle="", label=label, **style) for label, style in markers.items()]
    figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.07), ncols=5)
    remark = f"Largest error of ours: {worst_error(one.ours for one in found)}, relative to the largest float64 value."
    _finish(figure, found, f"Roofline at batch {batch}", remark, legend=0.45)
    return figure


def _finish(
    figure: Figure, comparisons: Sequence[Comparison], title: str, remark: str = "", legend: float = 0.0
) -> None:
    """Title with GPU and dtype, and a caption with versions and commit; `legend` inches stay free above that."""
    newest = max((one.machine for one in comparisons), key=lambda machine: machine.date)
    sizes = dict.fromkeys(one.size for one in comparisons if one.is_network)
    runs = dict.fromkeys(run_of(one.machine) for one in comparisons)
    commits = run_of(newest) if len(runs) == 1 else f"{len(runs)} runs, the newest {run_of(newest)}"
    height = figure.get_figheight()
    heading = ", ".join([title, newest.gpu, comparisons[0].dtype, *sizes])
    figure.text(0.01, 1 - 0.12 / height, heading, fontsize=11, weight="bold", va="top")
    caption = f"driver {newest.driver}, torch {newest.torch}, Triton {newest.triton}, commit {commits}"
    marks = [] if newest.is_gpu else [f"{CPU_RUN}."]
    lines = [line for line in (*marks, remark, *textwrap.wrap(caption, 130)) if line]
    figure.text(0.01, 0.07 / height, "\n".join(lines), fontsize=7.5, color="#444444")
    low = (0.15 + 0.14 * len(lines) + legend) / height
    figure.tight_layout(rect=(0, low, 1, 1 - 0.4 / height))
