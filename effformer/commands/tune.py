"""Search for the fastest tiles on this GPU.

Time the kernels with other tiles than the table's, at the shapes that they have in a network, and write
the fastest down. Tiles that spill, leave the tensor cores, or need too much shared memory are not run.
The others must be accurate and give the same bits each time. Each result is written at once; the same
command goes on where it stopped.

Exit status: 0 when all is tuned, 75 when the time was over first, 1 if tiles of the table failed.

For example:
  effformer bench tune --model l3 --dtype bf16 --batch-size 256 1
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from . import common
from .bench import add_minutes

FOREVER = 1e6  # minutes; a wait takes no infinity


def add(commands: common.Commands) -> None:
    parser = common.add_command(commands, "tune", main, __doc__, common.RESUMES)
    option = parser.add_argument
    option("--model", nargs="+", type=common.model, default=["efficientformer_l1"], help="default: l1")
    option("--dtype", nargs="+", type=common.dtype, default=["bfloat16", "float16"], help="default: bf16 fp16")
    option("--batch-size", nargs="+", type=common.positive, default=[256, 1], metavar="N", help="default: 256 1")
    common.add_size(parser)
    option("--device", default="auto", help="cuda, cuda:1, ...; default: cuda")
    add_minutes(parser)
    option("--in-place", nargs="?", const="", metavar="FILE", help="write into a table for every card of this class, "
           "the shipped one or FILE, instead of this user's file for this card")  # fmt: skip
    option("--workers", type=common.positive, metavar="N", help="processes that compile; default: one for each core, "
           "16 at most")  # fmt: skip


def main(arguments: argparse.Namespace) -> int:
    from ..apps.info import versions
    from ..apps.verify import checks, why_not_verified
    from ..files import write_whole
    from ..kernels.tiling.choose import SHIPPED, read_user_entries, user_file
    from ..kernels.tiling.device import device_class, device_of
    from ..kernels.tiling.table import as_text, read_table
    from ..workload import OPERATIONS

    device = common.torch_device(arguments.device)
    reason = why_not_verified(device) if device.type == "cuda" else "it is not a GPU"
    if reason:
        raise ValueError(f"--device: got {device}, allowed is a GPU that the kernels run on ({reason})")
    from ..bench.offline.tune import DeviceLostError, State, merged, tune, write_user_entries
    from ..bench.offline.workers import cores

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
            OPERATIONS,
            [common.torch_dtype(name) for name in arguments.dtype],
            size=arguments.size,
            batch_size=batch,
        )
    ]
    print("  ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"{device} ({card.name}, {device_class(card)}); outcomes go to {state.path}", flush=True)
    done, failed = True, False
    seconds = 60 * (arguments.minutes or FOREVER)
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
