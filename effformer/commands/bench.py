"""`effformer bench run`, or `effformer bench` alone: whole networks, ours beside timm's."""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from ..apps.info import versions
from .common import torch_device

if TYPE_CHECKING:
    from ..bench.measure.records import Record

T = TypeVar("T")
COLUMNS = {"img/s": 10, "ms p50": 10, "(p99)": 12, "peak MiB": 10, "error": 9, "top-1": 8, "x img/s": 9, "x ms": 7}
MARGIN = 20.0  # seconds: for starting and stopping


def main(arguments: argparse.Namespace) -> int:
    from ..bench.measure.networks import FILE, MODELS, chosen, complete, in_order, run_ladder
    from ..bench.measure.records import folder, machine_of

    device = torch_device(arguments.device)
    on_gpu = device.type == "cuda"
    todo = in_order(
        _distinct(arguments.model) or [*MODELS[: None if on_gpu else 1]],
        _distinct(arguments.batch_size) or ([256, 1, 8, 64, 1024] if on_gpu else [1, 8]),
        _distinct(arguments.dtype) or (["bfloat16", "float16"] if on_gpu else ["float32", "bfloat16"]),
        _distinct(arguments.size) or ([(224, 224), (384, 384), (512, 512)] if on_gpu else [(224, 224)]),
    )
    known = dict.fromkeys(provider.name for cell in todo for provider in chosen(cell, None))
    providers = arguments.provider
    if providers is not None and (wrong := [name for name in providers if name not in known]):
        raise ValueError(f"--provider: got {wrong[0]!r}, allowed are {', '.join(map(repr, known))}")
    if providers is None and not on_gpu:  # on a CPU choosing kernels takes many minutes, and there are no graphs
        providers = [name for name in known if "max-autotune" not in name]
    todo = [cell for cell in todo if chosen(cell, providers)]
    machine = machine_of(device)
    path = folder(machine, arguments.output) / FILE
    done = complete(path, machine, providers)
    if arguments.list:
        print("providers: " + ", ".join(repr(name) for name in known if providers is None or name in providers))
        for cell in todo:
            print(f"{'measured ' if cell in done else 'to do    '} {cell}: {len(chosen(cell, providers))} rungs")
        return 0
    print("  ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"{device} ({machine.gpu}); results go to {path}")
    if not on_gpu:
        print("CPU run: says nothing about a GPU")
    remaining = [cell for cell in todo if cell not in done]
    print(f"{len(todo) - len(remaining)} of {len(todo)} cells are measured already\n", flush=True)
    seconds = max(60 * arguments.minutes - MARGIN, 30 * arguments.minutes)
    failed: list[str] = []
    for outcome in run_ladder(
        remaining, path, lambda: machine_of(device), device, seconds, providers=providers, tell=_tell
    ):
        print("\n".join(table(outcome.records)) + "\n", flush=True)
        if outcome.whole:
            remaining.remove(outcome.cell)
        failed += [f"{outcome.cell}: {name} failed" for name in outcome.failed]
    for line in failed:
        print(f"effformer: {line}", file=sys.stderr)
    if remaining:
        names = "; ".join(map(str, remaining[:4])) + (" ..." if len(remaining) > 4 else "")
        print(f"{len(remaining)} of {len(todo)} cells remain ({names}): the same command goes on from here")
    return 1 if failed else os.EX_TEMPFAIL if remaining else 0


HEAD = (
    f"{'':<52}{'img/s':>10}{'ms p50':>10}{'(p99)':>11}{'peak MiB':>10}{'error':>9}{'top-1':>8}{'x img/s':>9}{'x ms':>7}"
)


def table(records: Sequence[Record]) -> list[str]:
    """A cell's rungs, a line each; x is the speed-up over the fastest rival of the cell, which is named below."""
    from ..bench.measure.network_providers import Cell, rungs, strongest

    by_provider: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_provider[record.provider].append(record)
    values = {name: {record.metric: record.p50 for record in found} for name, found in by_provider.items()}
    cell = Cell(records[0].op, records[0].shape[0], records[0].dtype, *records[0].shape[2:])
    rivals = [p.name for p in rungs(cell) if p.is_rival and "img/s" in values.get(p.name, {})]
    fastest = max(rivals, key=lambda name: values[name]["img/s"], default=None)
    quickest = min(rivals, key=lambda name: values[name]["ms"], default=None)
    head = "".join(title.rjust(width) for title, width in COLUMNS.items())
    lines = [f"{cell}", " " * 52 + head]
    for name, found in values.items():
        if "not run" in found:
            lines.append(f"  {name:<50}  not run: {by_provider[name][0].why}")
            continue
        cells = (
            f"{found['img/s']:.1f}",
            f"{found['ms']:.3f}",
            f"({found['p99 ms']:.3f})",
            f"{found['peak MiB']:.0f}" if "peak MiB" in found else "-",
            f"{found['max error']:.1e}",
            f"{found['top-1 agreement']:.1%}",
            f"{found['img/s'] / values[fastest]['img/s']:.2f}" if fastest else "-",
            f"{values[quickest]['ms'] / found['ms']:.2f}" if quickest else "-",
        )
        aligned = (text.rjust(width) for text, width in zip(cells, COLUMNS.values(), strict=True))
        lines.append(f"  {name:<50}{''.join(aligned)}")
    if fastest and quickest:
        lines.append(f"  baseline: {fastest}" + (f" (img/s), {quickest} (ms)" if quickest != fastest else ""))
    if rivals and (missing := [name for name in strongest(cell) if "ms" not in values.get(name, {})]):
        lines.append(f"  not measured, so that a rival may be faster yet: {', '.join(missing)}")
    for name, found_records in by_provider.items():
        if remarks := {record.why for record in found_records if record.why and record.metric in ("ms", "img/s")}:
            lines.append(f"  {name}: {'; '.join(sorted(remarks))}")
    return lines


def _distinct(values: list[T] | None) -> list[T]:
    return list(dict.fromkeys(values or ()))


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
