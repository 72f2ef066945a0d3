"""README's table of speeds and its picture, from the results files alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from .comparison import Comparison, Measured
from .tables import error, number, run_of, share, times

BEGIN, END = "<!-- benchmark -->", "<!-- /benchmark -->"
DTYPE, SIZE, BATCHES = "bfloat16", "224x224", (256, 1)
NOTHING = (
    "No GPU has been measured yet, so there is no figure to show. `effformer bench` measures one, and\n"
    "`effformer bench report --readme README.md` writes its table here, from the results files."
)
HEADER = (
    "", "batch", "baseline", "img/s", "ours", "speed-up", "ms p50 (p99)", "ours", "max error", "ours",
    "top-1 agreement", "ours",
)  # fmt: skip


def with_results(readme: str, found: Sequence[Measured], folder: Path) -> str:
    """A README with what was measured between its markers.

    Args:
        readme: its text.
        found: results, of which those of GPUs are shown.
        folder: where the README lies, to which the picture's place is relative.

    Raises:
        ValueError: if the README has not each marker once, in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(END) < readme.index(BEGIN):
        raise ValueError(f"README: got no single {BEGIN} before a single {END}, which is where results are written")
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{benchmark(found, folder)}\n{END}{after}"


def benchmark(found: Sequence[Measured], folder: Path) -> str:
    """What stands between the markers."""
    sections = [section for measured in found if measured.is_gpu for section in _section(measured, folder)]
    return "\n\n".join(sections) or NOTHING


def _section(measured: Measured, folder: Path) -> Iterator[str]:
    cells = [cell for cell in measured.backbones if is_shown(cell)]
    if not cells:
        return
    cells.sort(key=lambda cell: (cell.op, BATCHES.index(cell.batch)))
    newest = max((cell.machine for cell in cells), key=lambda machine: machine.date)
    versions = f"driver {newest.driver}, torch {newest.torch}, Triton {newest.triton}"
    runs = "; ".join(dict.fromkeys(run_of(cell.machine) for cell in cells))
    yield (
        f"{newest.gpu}, {DTYPE}, {SIZE}; {versions}; commit and date: {runs}.\n"
        "Baseline: the fastest of timm's rungs in the same run, `torch.compile` in its strongest forms among them;\n"
        "its latency is the shortest of any of these. Errors are relative to the largest value of the float64 result."
    )
    rows = [HEADER, ("---",) * len(HEADER), *map(_row, cells)]
    yield "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
    if doubts := [f"{_row(cell)[0]} at batch {cell.batch}, {cell.doubts}" for cell in cells if cell.doubts]:
        yield f"To be read with care: {'; '.join(doubts)}."
    picture = measured.folder.resolve() / "report" / f"speedup-{DTYPE}-{SIZE}.png"
    yield f"![Speed-up over the baseline]({Path(os.path.relpath(picture, folder)).as_posix()})"


def is_shown(cell: Comparison) -> bool:
    """Whether it is of the table: no weak baseline gets there, since every rung was tried."""
    return (cell.dtype, cell.size) == (DTYPE, SIZE) and cell.batch in BATCHES and cell.has_every_rung


def _row(cell: Comparison) -> tuple[str, ...]:
    baseline, quickest, ours = cell.baseline("img/s"), cell.baseline("ms"), cell.ours

    def figures(metric: str) -> Iterator[str]:
        for result in (baseline, ours):
            value = None if result is None else result.value(metric)
            yield error(value) if metric == "max error" else share(value) if "top-1" in metric else number(value)

    latencies = [
        "" if result is None else f"{number(result.value('ms'))} ({number(result.value('p99 ms'))})"
        for result in (quickest, ours)
    ]
    speeds = [*figures("img/s")]
    if ours is not None and ours.not_run is not None:
        speeds[1], latencies[1] = f"not run: {' '.join(ours.not_run.split())}", ""
    return (
        cell.op.removeprefix("efficientformer_").upper(),
        str(cell.batch),
        "none" if baseline is None else baseline.provider,
        *speeds,
        times(cell.speedup("img/s")),
        *latencies,
        *figures("max error"),
        *figures("top-1 agreement"),
    )
