"""Execute every operation as compiled for every GPU type, on the CPU, and compare it with float64 (`make prove`).

Each check becomes a line of the records within seconds; the same command goes on where it stopped. It does again the
checks that failed, and those of other kernels, tiles, machines or versions of Triton. Of large grids
the first, middle and last programs run, and those that compute what these read. The writes of all programs are traced:
together they have to write the whole output. It needs no GPU. The exit status is 0 when all passed, 75 when the time
was over first, 1 after a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path

import triton

from ...commands.common import minutes
from ...config import PRESETS
from ...files import write_whole
from ...kernels.tiling.device import TARGETS
from ...kernels.tiling.table import DTYPES
from ...workload import OPERATIONS
from .proof import KINDS, Record, Task, part, run, tasks
from .workers import compilers, cores

ORDER = (90, 100, 80, 120, 86, 89)  # of the targets: the newest kinds of matrix units first
WRITE_EVERY = 20.0  # seconds
MODELS = sorted(PRESETS, key=lambda name: int(name.rpartition("l")[2]))


def read_records(path: Path) -> list[Record]:
    """All records of a file; none without one.

    Raises:
        ValueError: for a line that is no record, naming it.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else (), 1):
        try:
            fields = json.loads(line)
            found.append(Record(**{**fields, "shape": tuple(fields["shape"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: got {line[:60]!r}, allowed is a record ({error})") from error
    return found


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Add records to a file, in place of those of the same tasks and Triton."""
    key = attrgetter("key", "triton")
    found = {key(one): one for one in [*read_records(path), *records]}
    write_whole(path, "".join(json.dumps(asdict(one)) + "\n" for one in found.values()))


def prove(todo: Iterable[Task], workers: int, deadline: float) -> Iterator[Record]:
    """Run tasks side by side, none after the deadline (of `time.monotonic`); yield records as they come."""
    left = iter(todo)
    with compilers(workers) as pool:
        running: set[Future[Record]] = set()
        while True:
            while len(running) < workers and time.monotonic() < deadline and (task := next(left, None)) is not None:
                running.add(pool.submit(run, task))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks that are not recorded yet, print a table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--models", nargs="+", default=MODELS, choices=MODELS, metavar="MODEL")
    option("--operations", nargs="+", default=[*OPERATIONS], choices=OPERATIONS, metavar="NAME")
    option("--targets", nargs="+", type=int, default=list(ORDER), choices=TARGETS, metavar="SM")
    option("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"], choices=DTYPES, metavar="DTYPE")
    option("--batches", nargs="*", type=int, default=[256, 64, 8, 1], metavar="N")
    option("--kinds", nargs="+", default=list(KINDS), choices=KINDS, metavar="KIND")
    option("--part", action="store_true", help="a few checks that launch every kernel, in bfloat16")
    option("--minutes", type=minutes, default=float("inf"), help="start nothing new after these")
    option("--output", type=Path, default=Path("bench/results/executed.jsonl"), metavar="FILE")
    option("--workers", type=int, default=cores(), metavar="N", help="default: %(default)s")
    arguments = parser.parse_args(argv)

    deadline = time.monotonic() + 60 * arguments.minutes
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of the workers: tensors stay on the CPU
    dtypes = [DTYPES[name] for name in arguments.dtypes]
    wanted = tasks(arguments.models, arguments.batches, dtypes, arguments.targets, arguments.operations)
    todo = part(arguments.targets) if arguments.part else [task for task in wanted if task.kind in arguments.kinds]
    records = {one.key: one for one in read_records(arguments.output) if one.is_current}
    new = [task for task in todo if task.key not in records or not records[task.key].passes]
    print(f"triton {triton.__version__}, {len(todo)} checks, {len(todo) - len(new)} of them recorded", flush=True)
    unwritten, last = [], time.monotonic()
    try:
        for record in prove(new, arguments.workers, deadline):
            records[record.key] = record
            unwritten.append(record)
            print(describe(record), flush=True)
            if time.monotonic() - last > WRITE_EVERY:  # each time the whole file
                write_records(arguments.output, unwritten)
                unwritten, last = [], time.monotonic()
    finally:
        write_records(arguments.output, unwritten)
    found = [records[task.key] for task in todo if task.key in records]
    print("\n" + "\n".join(table(found)))
    failed = [record for record in found if not record.passes]
    print(f"\n{len(found)} of {len(todo)} checks done, {len(failed)} failed")
    for record in failed:
        error = [record.error] if record.error else []
        print("\n    ".join([f"FAIL {describe(record)}", *error, *record.faults[:8]]))
    return 1 if failed else os.EX_TEMPFAIL if len(found) < len(todo) else 0


def describe(record: Record) -> str:
    """One line."""
    shape = "x".join(map(str, record.shape))
    ratio = "-" if record.ratio is None else f"{record.ratio:.2f}"
    ran = ", ".join(
        f"{one['programs']} of {one['grid']} {one['kernel'].removesuffix('_kernel')}" for one in record.kernels
    )
    verdict = "pass" if record.passes else "FAIL"
    return (
        f"{record.target:<6} {record.dtype:<8} {record.operation:<15} {shape:<18} {record.kind:<9} {verdict} "
        f"ratio {ratio}, {len(record.faults)} faults, {record.seconds:.1f} s: {ran}"
    )


def table(records: Sequence[Record]) -> Iterator[str]:
    """By target and dtype: numbers of checks, failures, faults and seconds, and of each operation the worst ratio."""
    head = f"{'target':<7}{'dtype':<10}{'checks':>7}{'failed':>7}{'faults':>7}{'seconds':>9}"
    yield f"{head}  worst error, as a multiple of eager's"
    groups = dict.fromkeys((record.target, record.dtype) for record in records)
    for target, dtype in groups:
        mine = [record for record in records if (record.target, record.dtype) == (target, dtype)]
        failed, faults = sum(not one.passes for one in mine), sum(len(one.faults) for one in mine)
        worst: dict[str, float] = {}
        for one in mine:
            worst[one.operation] = max(worst.get(one.operation, 0.0), one.ratio or 0.0)
        ratios = ", ".join(f"{name} {worst[name]:.2f}" for name in OPERATIONS if name in worst)
        seconds = sum(one.seconds for one in mine)
        yield f"{target:<7}{dtype:<10}{len(mine):>7}{failed:>7}{faults:>7}{seconds:>9.0f}  {ratios}"


if __name__ == "__main__":
    sys.exit(main())
