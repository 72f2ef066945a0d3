"""Count the work of a network's kernels, without a GPU.

Compile the kernels of each launch for a GPU that is not here, execute a few programs on the CPU, and
scale their counts to the grid: warp instructions by class, sectors of global memory and wavefronts of
shared memory beside the fewest possible, matrix operations, waves of the grid. Beside them stands the
estimate of the time that follows on the named GPU. It is arithmetic, and no time was measured.

With --recorded the committed records are printed instead. With --update they are written anew,
network by network.

For example:
  effformer bench counts --model l1 --batch-size 256 --target sm_90 --gpu H200
  effformer bench counts --model l1 l3 l7 --target sm_80 sm_90 sm_100 --update
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..workload import OPERATIONS
from . import common

if TYPE_CHECKING:
    from ..bench.offline.bounds import Gpu
    from ..bench.offline.counted import Record

TARGETS = ("sm_80", "sm_90", "sm_100")
GPUS = ("A100", "H100", "H200", "B200")  # as `effformer.bench.offline.bounds.GPUS`, which imports torch
NOTE = "arithmetic, not time: estimates by counts of executed PTX; no time was measured"
_THIS = "commands.bench_counts"


def add(commands: common.Commands) -> None:
    kept = "records of the networks that were finished are kept"
    parser = common.add_command(commands, "counts", main, __doc__, kept)
    option = parser.add_argument
    option("--model", nargs="+", type=common.model, default=["efficientformer_l1"], help="l1, l3, l7; default: l1")
    option("--op", nargs="+", type=common.one_of("workload", "OPERATIONS"), help="of "
           f"{', '.join(OPERATIONS)}; default: all")  # fmt: skip
    option("--batch-size", nargs="+", type=common.positive, default=[256, 1], metavar="N", help="default: 256 1")
    option("--target", nargs="+", type=common.one_of(_THIS, "TARGETS"), metavar="SM", help=f"of {', '.join(TARGETS)}; "
           "default: sm_90")  # fmt: skip
    option("--gpu", type=common.one_of(_THIS, "GPUS"), help=f"whose estimates are printed, of {', '.join(GPUS)}; "
           "default: the first of them with the target")  # fmt: skip
    option("--dtype", type=common.dtype, default="bfloat16", help="bf16, fp16 or fp32; default: bf16")
    option("--recorded", action="store_true", help="print the records instead of executing")
    option("--update", action="store_true", help="write the new records")
    option("--results", type=Path, default=Path("bench/results/counts.jsonl"), metavar="FILE", help="the records; "
           "default: %(default)s")  # fmt: skip
    common.add_json(parser)


def main(arguments: argparse.Namespace) -> int:
    if arguments.update and (arguments.recorded or arguments.op):
        other = "--recorded" if arguments.recorded else "--op"
        raise ValueError(f"--update: got {other} as well, allowed is only without: it writes the records of whole "
                         "networks")  # fmt: skip
    if not arguments.recorded:
        common.execute_on_cpu()
    from ..bench.offline.bounds import GPUS, bounds, gpus_of
    from ..bench.offline.counted import write_records

    targets = arguments.target or [GPUS[arguments.gpu].target if arguments.gpu else "sm_90"]
    for target in targets:
        if arguments.gpu not in (None, *gpus_of(target)):
            raise ValueError(f"--gpu: got {arguments.gpu}, allowed with {target} are {', '.join(gpus_of(target))}")
    say, facts = common.printer(arguments.json), []
    say(f"{NOTE[0].upper()}{NOTE[1:]}.")
    for model, batch, target in itertools.product(arguments.model, arguments.batch_size, targets):
        name = arguments.gpu or gpus_of(target)[0]
        say(f"\n{model}, batch {batch}, {arguments.dtype}, {target}; estimates for {name}, by arithmetic")
        start = time.perf_counter()
        records = _records(arguments, model, batch, target)
        if not arguments.recorded:
            say(f"executed in {time.perf_counter() - start:.0f} s")
        if arguments.update:
            write_records(records, arguments.results)
        if not arguments.json:
            print("\n".join(_lines(records, GPUS[name], name)), flush=True)
        facts += [asdict(one) | {"gpu": name, "estimated_seconds": bounds(one, GPUS[name])} for one in records]
    if arguments.update:
        say(f"written: {arguments.results}")
    if arguments.json:
        common.print_json({"note": NOTE, "launches": facts})
    return 0


def _records(arguments: argparse.Namespace, model: str, batch: int, target: str) -> list[Record]:
    from ..bench.offline.counted import count_network, read_records

    operations = arguments.op or OPERATIONS
    if not arguments.recorded:
        dtype, capability = common.torch_dtype(arguments.dtype), int(target.removeprefix("sm_"))
        return list(count_network(model, batch, dtype, capability, wanted=lambda work: work.operation in operations))
    network = model, batch, arguments.dtype, target
    found = [one for one in read_records(arguments.results) if one.network == network and one.operation in operations]
    if not found:
        raise ValueError(f"--recorded: got {model}, batch {batch}, {arguments.dtype}, {target}, allowed are those with "
                         f"records in {arguments.results}")  # fmt: skip
    return found


# --- tables -----------------------------------------------------------------------------------------------------------


def _lines(records: Sequence[Record], gpu: Gpu, name: str) -> Iterator[str]:
    from ..bench.offline.bounds import BOUNDS, bound, bounds
    from ..bench.report.tables import number, table

    def total(value: Callable[[Record], float]) -> float:
        return sum(one.count * value(one) for one in records)

    def figures(value: Callable[[Callable[[Record], float]], float]) -> dict[str, str]:
        """Of one call of a launch, or of the network."""

        def scaled(*names: str, unit: float) -> str:
            return " / ".join(number(value(lambda one: getattr(one, each) / unit)) for each in names)  # noqa: B023

        times = {
            f"{key} us": number(value(lambda one: 1e6 * bounds(one, gpu)[key]))  # noqa: B023
            for key in BOUNDS
        }
        sector = 1e6 / 32
        read = f"{scaled('sectors_read', 'ideal_sectors_read', unit=sector)} / {scaled('distinct_read', unit=1e6)}"
        written = (
            f"{scaled('sectors_written', 'ideal_sectors_written', unit=sector)} / "
            f"{scaled('distinct_written', unit=1e6)}"
        )
        return {
            "M instr.": scaled("instructions", unit=1e6),
            "MB read/ideal/distinct": read,
            "written": written,
            "M wavefr./ideal": scaled("wavefronts", "ideal_wavefronts", unit=1e6),
            "GFLOP": scaled("flops", unit=1e9),
            **times,
        }

    def row(one: Record) -> dict[str, str]:
        about = {
            "part": one.part,
            "calls": str(one.count),
            "kernel": one.kernel.removesuffix("_kernel"),
            "grid": f"{one.grid} x {one.warps}",
            "fit": str(one.fitting),
            "waves": number(one.waves[name]),
        }
        return about | figures(lambda each: each(one)) | {"bound": bound(one, gpu)[0]}

    whole = dict.fromkeys(("calls", "kernel", "grid", "fit", "waves", "bound"), "")
    sums = {"part": "a forward"} | whole | figures(total)
    rows = [row(one) for one in records]
    yield table([*rows, {column: sums[column] for column in rows[0]}])
    seconds = total(lambda one: bound(one, gpu)[1])
    yield f"sum of the launches' bounds: {number(1e6 * seconds)} us on {name}, by arithmetic"
    yield "\nM warp instructions by class"
    classes = list(dict.fromkeys(key for one in records for key in one.by_class))
    yield table([_by_class(one, classes, number) for one in records])


def _by_class(one: Record, classes: Sequence[str], number: Callable[[float], str]) -> dict[str, Any]:
    counts = {key: number(one.by_class.get(key, 0) / 1e6) for key in classes}
    return {"part": one.part, "kernel": one.kernel.removesuffix("_kernel")} | counts
