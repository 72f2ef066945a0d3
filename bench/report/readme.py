"""Markdown from the results files alone: the report of one GPU, and the table in the project's README."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from .comparison import Comparison, ResultsFolder
from .tables import CPU_RUN, machine_rows, number, provider_rows, run_of, summary_row, table, times, words, worst_error

BEGIN, END = "<!-- benchmark -->", "<!-- /benchmark -->"
DTYPE, SIZE, BATCHES = "bfloat16", "224x224", (256, 1)
NOTHING = (
    "No comparison is complete yet: it needs every form of timm's network on one GPU. `effformer bench` measures\n"
    "them, and `effformer bench report --readme README.md` writes the table here, from the results files."
)
SUMMARY = (
    "Two figures are those of the baseline / ours frozen. The baseline is the fastest form of timm's network; where "
    "timm cannot run, of our own eager network compiled. Its latency is the shortest of any form. Errors are relative "
    "to the largest value of the float64 result, top-1 agreement is with float32."
)


# --- the report -------------------------------------------------------------------------------------------------------


def report(results: ResultsFolder, pictures: Sequence[tuple[str, str]]) -> str:
    """The report. `pictures`: (file name, title) of files in the report's folder."""
    return "\n\n".join(_parts(results, pictures)).replace("<", r"\<") + "\n"


def _parts(results: ResultsFolder, pictures: Sequence[tuple[str, str]]) -> Iterator[str]:
    yield f"# effformer on {results.machines[0].gpu}"
    if not results.is_gpu:
        yield f"**{CPU_RUN}.**"
    for name, title in pictures:
        yield f"![{title}]({name})"
    if results.networks:
        yield f"## Networks\n\n{table([summary_row(one) for one in results.networks])}\n\n{SUMMARY}"
    for title, comparisons in (("Every provider", results.networks), ("Operations", results.operations)):
        for name, group in groupby(comparisons, key=lambda one: one.op):
            yield f"## {title}: {name}\n\n{table([row for one in group for row in _rows(one)])}"
    yield f"## Measured on\n\n{table(machine_rows(results.machines))}"


def _rows(comparison: Comparison) -> Iterator[dict[str, str]]:
    shape = ", ".join(filter(None, ["x".join(map(str, comparison.shape)), words(comparison.options)]))
    for row in provider_rows(comparison):
        yield {"dtype": comparison.dtype, "shape": shape, "run": run_of(comparison.machine)} | row


# --- README -----------------------------------------------------------------------------------------------------------


def with_results(readme: str, found: Sequence[ResultsFolder], folder: Path) -> str:
    """A README with the results between its markers.

    Args:
        readme: its text.
        found: results, of which those of GPUs are shown.
        folder: of the README, to which the picture's place is relative.

    Raises:
        ValueError: if the README has not each marker once, in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(END) < readme.index(BEGIN):
        raise ValueError(f"README: got no single {BEGIN} before a single {END}, between which the results belong")
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    sections = [section for results in found if results.is_gpu for section in _section(results, folder)]
    text = "\n\n".join(sections) or NOTHING
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def _section(results: ResultsFolder, folder: Path) -> Iterator[str]:
    shown = [one for one in results.networks if (one.dtype, one.size) == (DTYPE, SIZE) and one.batch in BATCHES]
    shown = [one for one in shown if one.is_whole]  # of others the strongest baseline is not known
    if not shown:
        return
    shown.sort(key=lambda one: (one.op, BATCHES.index(one.batch)))
    newest = max((one.machine for one in shown), key=lambda machine: machine.date)
    yield table([_row(one) for one in shown])
    runs = "; ".join(dict.fromkeys(run_of(one.machine) for one in shown))
    ours, timm = worst_error(one.ours for one in shown), worst_error(one.baseline("img/s") for one in shown)
    yield (
        f"Images a second on {newest.gpu}, {DTYPE}, {SIZE}. Best timm: its fastest form in the same run, compiled or\n"
        f"not. Largest error against float64, relative to the largest value: timm {timm}, effformer {ours}.\n"
        f"Driver {newest.driver}, torch {newest.torch}, Triton {newest.triton}, timm {newest.timm}; {runs}."
    )
    if doubts := [f"{one.name} at batch {one.batch}, {one.doubts}" for one in shown if one.doubts]:
        yield f"To be read with care: {'; '.join(doubts)}."
    picture = results.folder.resolve() / "report" / f"speedup-{DTYPE}-{SIZE}.png"
    yield f"![Speed-up over the baseline]({Path(os.path.relpath(picture, folder)).as_posix()})"


def _row(comparison: Comparison) -> dict[str, str]:
    baseline, ours = comparison.baseline("img/s"), comparison.ours
    found = "none" if baseline is None else f"{number(baseline.value('img/s'))} ({baseline.provider.split(' ', 1)[1]})"
    own = "" if ours is None else f"not run: {ours.not_run}" if ours.not_run else number(ours.value("img/s"))
    return {
        "model": comparison.name,
        "batch": str(comparison.batch),
        "best timm": found,
        "effformer": own,
        "speed-up": times(comparison.speedup("img/s")),
    }
