"""`effformer bench tune`: the fastest tiles for the GPU at hand."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..apps.info import versions
from ..apps.verify import OPERATIONS, checks, why_not_verified
from ..apps.verify_report import NETWORK
from ..kernels.tiling.choose import SHIPPED, read_user_entries, user_file, write_user_entries, write_whole
from ..kernels.tiling.device import device_class, device_of
from ..kernels.tiling.table import as_text, read_table
from .common import DTYPES, torch_device

MARGIN = 40.0  # seconds: for starting, and for what is under way when the time is up


def main(arguments: argparse.Namespace) -> int:
    device = torch_device(arguments.device)
    reason = why_not_verified(device) if device.type == "cuda" else "it is no GPU"
    if reason:
        raise ValueError(f"--device: got {device}, allowed is a GPU that the kernels run on ({reason})")
    from ..bench.offline.audit import cores
    from ..bench.offline.tune import DeviceLostError, State, merged, tune

    card, target = device_of(device), user_file()
    if arguments.in_place is not None:
        target = Path(arguments.in_place or SHIPPED)
        table = read_table(target if target.exists() else SHIPPED)
    else:
        others = [entry for entry in read_user_entries(target) if entry.gpu != card.name]
    if not os.access(next(folder for folder in target.absolute().parents if folder.exists()), os.W_OK):
        raise PermissionError(f"{target} cannot be written")
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
    done, failed = True, False
    seconds = max(60 * arguments.minutes - MARGIN, 0.5 * 60 * arguments.minutes)
    cache = user_file().with_name("audit")
    try:
        for tuned in tune(todo, device, state, seconds=seconds, workers=arguments.workers or cores(), cache=cache):
            done = tuned is not None
            failed |= tuned is not None and tuned.fault is not None
            print(tuned or "the time is over: the same command goes on from here", flush=True)
    except DeviceLostError as error:
        done = False
        print(f"effformer: {error}; the same command goes on without it", file=sys.stderr)
    if arguments.in_place is None:
        write_user_entries(target, others + state.entries(card.name))
    else:
        write_whole(target, as_text(merged(state.entries(None), table)))
    print(f"written: {target}")
    return 1 if failed else 0 if done else os.EX_TEMPFAIL
