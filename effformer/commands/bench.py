"""Measure whole networks beside timm's, as it is and compiled.

Throughput, latency, memory, errors against float64 and top-1 agreement with float32: of timm's network
(eager, BatchNorm folded, torch.compile up to max-autotune) and of ours (eager, Triton, frozen). All get
the same weights and images, and each runs in a process of its own. A measurement is a model at a batch
size, dtype and image size. Each result is written at once to FOLDER/<gpu>/networks.jsonl; the same
command goes on where it stopped.

Exit status: 0 when all is measured, 75 when the time was over first, 1 if one of our networks failed.

For example:
  effformer bench --model l1 --dtype bf16 --batch-size 256 1
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from . import common

if TYPE_CHECKING:
    from ..bench.measure.records import Key, Record
    from ..bench.measure.resume import ResultsFile

T = TypeVar("T")
OPTIONAL = {"timm": "its networks are not run", "matplotlib": "the report has no pictures"}


def add(commands: common.Commands) -> None:
    parser = common.add_command(commands, "run", main, __doc__, common.RESUMES)
    option = parser.add_argument
    option("--model", nargs="+", type=common.model, help="default: all; on a CPU l1")
    option("--dtype", nargs="+", type=common.dtype, help="default: bf16 fp16; on a CPU fp32 bf16")
    option("--batch-size", nargs="+", type=common.positive, metavar="N", help="default: 256 1 8 64 1024; on a CPU 1 8")
    option("--size", nargs="+", type=common.size, metavar="HxW", help="default: 224x224 384x384 512x512; "
           "on a CPU 224x224")  # fmt: skip
    option("--provider", nargs="+", metavar="NAME", help="of those that --list names; default: all; on a CPU all "
           "without max-autotune")  # fmt: skip
    add_measuring(parser)
    option("--list", action="store_true", help="only list the measurements, and which are complete")


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that measures."""
    common.add_device(parser)
    add_minutes(parser)
    parser.add_argument("--output", type=Path, default=Path("bench/results"), metavar="FOLDER", help="holds a folder "
                        "for each GPU; default: %(default)s")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the records of these measurements as lines of JSON; "
                        "messages go to stderr")  # fmt: skip


def add_minutes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=common.minutes, metavar="M", help="start nothing new after these; default: "
                        "go on until all is done")  # fmt: skip


def main(arguments: argparse.Namespace) -> int:
    from ..bench.measure import networks

    file = open_results(arguments, networks.FILE)
    on_gpu = file.machine.is_gpu
    todo = networks.in_order(
        arguments.model or networks.MODELS[: None if on_gpu else 1],
        arguments.batch_size or ([256, 1, 8, 64, 1024] if on_gpu else [1, 8]),
        arguments.dtype or (["bfloat16", "float16"] if on_gpu else ["float32", "bfloat16"]),
        arguments.size or ([(224, 224), (384, 384), (512, 512)] if on_gpu else [(224, 224)]),
    )
    known = dict.fromkeys(provider.name for one in todo for provider in networks.chosen(one, None))
    providers = arguments.provider
    if providers is not None and (wrong := [name for name in providers if name not in known]):
        raise ValueError(f"--provider: got {wrong[0]!r}, allowed are {', '.join(map(repr, known))}")
    if providers is None and not on_gpu:  # on a CPU choosing kernels takes many minutes, and there are no graphs
        providers = [name for name in known if "max-autotune" not in name]
    todo = [one for one in todo if networks.chosen(one, providers)]
    if arguments.list:
        print("providers: " + ", ".join(repr(name) for name in known if providers is None or name in providers))
        for one in todo:
            state = "complete" if networks.is_complete(one, file, providers) else "to do   "
            print(f"{state}  {one}: {len(networks.chosen(one, providers))} providers")
        return 0
    return show(
        arguments,
        file,
        todo,
        key=lambda one: one.key,
        is_complete=lambda one: networks.is_complete(one, file, providers),
        measure=functools.partial(networks.measure_networks, providers=providers),
    )


def open_results(arguments: argparse.Namespace, name: str) -> ResultsFile:
    """The results file `name` of the machine at hand; its time begins now."""
    from ..bench.measure.records import folder, machine_of
    from ..bench.measure.resume import ResultsFile

    deadline = math.inf if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    machine = machine_of(common.torch_device(arguments.device))
    return ResultsFile(folder(machine, arguments.output) / name, machine, deadline)


def show(
    arguments: argparse.Namespace,
    file: ResultsFile,
    todo: Sequence[T],
    *,
    key: Callable[[T], Key],
    is_complete: Callable[[T], bool],
    measure: Callable[..., Iterator[list[Record]]],
) -> int:
    """Measure `todo` and print the results as they come; returns the exit status.

    Args:
        arguments: of the command.
        file: of the results.
        todo: all measurements that were asked for.
        key: of one, as the records have it.
        is_complete: whether one needs no more measuring.
        measure: `measure_networks` or `measure_operations`.
    """
    from ..apps.info import versions
    from ..bench.measure.resume import DeviceLostError, failures
    from ..bench.report.comparison import compare
    from ..bench.report.tables import CPU_RUN, as_text

    def show_records(records: Sequence[Record]) -> None:
        lines = [record.as_json() for record in records] if arguments.json else [*map(as_text, compare(records)), ""]
        print("\n".join(lines), flush=True)

    say, tell = common.printer(arguments.json), common.printer(True)
    say_missing(say)
    say("  ".join(f"{name} {version}" for name, version in versions().items()))
    say(f"{file.machine.gpu}, commit {file.machine.commit}; results go to {file.path}")
    if not file.machine.is_gpu:
        say(CPU_RUN)
    done = [one for one in todo if is_complete(one)]
    say(f"{len(done)} of {len(todo)} measurements are complete already\n")
    for one in done if arguments.json else ():
        show_records(file.records(key(one)))
    try:
        for records in measure(todo, file, common.torch_device(arguments.device), tell=tell):
            show_records(records)
    except DeviceLostError as error:
        tell(f"effformer: {error}; the same command goes on without it")
    wrong = failures(record for one in todo for record in file.records(key(one)))
    for line in wrong:
        tell(f"FAIL {line}")
    left = [one for one in todo if not is_complete(one)]
    if left:
        names = "; ".join(map(str, left[:4])) + (" ..." if len(left) > 4 else "")
        say(f"{len(left)} of {len(todo)} measurements remain ({names}): the same command goes on from here")
    return 1 if wrong else os.EX_TEMPFAIL if left else 0


def say_missing(say: Callable[[str], object]) -> None:
    """Say in one line which optional packages are missing, and the consequence."""
    if missing := [f"{name} ({loss})" for name, loss in OPTIONAL.items() if importlib.util.find_spec(name) is None]:
        say(f"not installed: {', '.join(missing)}")
