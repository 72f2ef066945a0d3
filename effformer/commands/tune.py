"""`effformer bench tune`: the fastest tiles for the GPU at hand."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..kernels.config import SHIPPED, read_user_entries, shipped_table, user_file, write_user_entries
from ..kernels.device import device_class, device_of
from ..kernels.table import as_text
from ..outcome import NETWORK
from ..summary import versions
from ..verification import OPERATIONS, checks, why_not_verified
from .common import DTYPES, torch_device


def main(arguments: argparse.Namespace) -> int:
    device = torch_device(arguments.device)
    reason = why_not_verified(device) if device.type == "cuda" else "it is no GPU"
    if reason:
        raise ValueError(f"--device: got {device}, allowed is a GPU that the kernels run on ({reason})")
    from ..bench.tune import State, merged, tune

    card = device_of(device)
    state = State(user_file().with_name("tuning.jsonl"), card)
    todo = [
        check
        for batch in sorted(arguments.batch_size, reverse=True)
        for check in checks(
            arguments.model,
            [name for name in OPERATIONS if name != NETWORK],
            [DTYPES[name] for name in arguments.dtype],
            size=arguments.size,
            batch_size=batch,
        )
    ]
    print("  ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"{device} ({card.name}, {device_class(card)}); outcomes go to {state.path}", flush=True)
    done = True
    for tuned in tune(todo, device, state, seconds=60 * arguments.minutes):
        done = tuned is not None
        print(tuned or "the time is over: the same command goes on from here", flush=True)
    target: Path = user_file()
    if arguments.in_place is None:
        others = [entry for entry in read_user_entries(target) if entry.gpu != card.name]
        write_user_entries(target, others + state.entries(card.name))
    else:
        target = SHIPPED if arguments.in_place == "" else Path(arguments.in_place)
        target.write_text(as_text(merged(state.entries(None), shipped_table().entries)), encoding="utf-8")
    print(f"written: {target}")
    return 0 if done else os.EX_TEMPFAIL
