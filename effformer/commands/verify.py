"""`effformer verify`: the kernels against float64."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..apps.info import describe_backend, devices, versions
from ..apps.verify import OPERATIONS, checks, verify, why_not_verified
from ..apps.verify_report import VERDICTS, Outcome, Table, conclusion
from ..config import PRESETS
from .common import DTYPES, torch_device


def main(arguments: argparse.Namespace) -> int:
    device = torch_device(arguments.device)
    if device.type == "cpu" and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
    on_gpu = device.type == "cuda"
    batch_size = arguments.batch_size or (8 if on_gpu else 2)
    repeats = arguments.repeats if arguments.repeats is not None else 3 if on_gpu else 0
    todo = checks(
        _chosen(arguments.model, PRESETS, ["efficientformer_l1"]),
        _chosen(arguments.op, OPERATIONS, OPERATIONS),
        [DTYPES[name] for name in _chosen(arguments.dtype, DTYPES, DTYPES)],
        size=arguments.size,
        batch_size=batch_size,
    )
    reason, table = why_not_verified(device), Table(todo)
    facts: dict[str, Any] = {
        "versions": versions(),
        "device": str(device),
        "device_name": devices()[str(device)],
        "interpreted": reason is None and not on_gpu,
        "backend": describe_backend("auto", device),
        "size": [*arguments.size],
        "batch_size": batch_size,
        "seed": arguments.seed,
        "repeats": repeats,
    }
    if not arguments.json:
        height, width = arguments.size
        print("  ".join(f"{name} {version}" for name, version in versions().items()))
        print(f"device:   {device} ({facts['device_name']}){', by interpretation' if facts['interpreted'] else ''}")
        print(f"backend:  {facts['backend']}; verified here: {'none' if reason else 'triton'}")
        print(f"input:    {batch_size}x3x{height}x{width}, seed {arguments.seed}, {repeats} further runs\n")
        if reason is None:
            print(table.head())
    outcomes = []
    followed, write = _followed(verify(todo, device, seed=arguments.seed, repeats=repeats), len(todo))
    for outcome in followed:
        outcomes.append(outcome)
        if not arguments.json and not outcome.skipped:
            write(table.line(outcome))

    counts = {verdict: sum(outcome.verdict == verdict for outcome in outcomes) for verdict in VERDICTS}
    passed = counts["pass"] > 0 and counts["fail"] == 0
    if arguments.json:
        facts |= {"passed": passed, "counts": counts, "why_no_kernel": reason}
        facts["checks"] = [outcome.facts() for outcome in outcomes]
        print(json.dumps(facts, indent=2, allow_nan=False))
    else:
        if reason is None:
            print()
        print("\n".join(conclusion(outcomes)))
    return 0 if passed else 1


def _chosen(named: list[str] | None, allowed: Iterable[str], default: Iterable[str]) -> list[str]:
    """What an option that may be repeated, or be "all", stands for."""
    return [*default] if named is None else [*allowed] if "all" in named else named


def _followed(outcomes: Iterator[Outcome], total: int) -> tuple[Iterable[Outcome], Callable[[str], object]]:
    """`outcomes` with a bar where tqdm is installed and stderr is a terminal, and what prints beside it."""
    try:
        from tqdm import tqdm
    except ImportError:
        if sys.stderr.isatty():
            print("effformer: no progress bar without tqdm, of effformer[image]", file=sys.stderr)
        return outcomes, print
    return tqdm(outcomes, total=total, unit="check", disable=None, leave=False), tqdm.write
