"""`effformer bench kernels`: the fused operations against what one could take instead."""

from __future__ import annotations

import argparse
import os
import sys

from ..apps.info import versions
from ..bench.measure import operations as kernels
from ..bench.measure.records import append_records, folder, machine_of, read_records
from ..config import PRESETS
from .common import DTYPES, torch_device

MARGIN = 90.0  # seconds: for starting, and for the cell that is under way when the time is up
# Models, dtypes and batch sizes that are measured where none are named.
ON_GPU = (list(PRESETS), ["bfloat16", "float16", "float32"], [256, 1, 8, 64])
ON_CPU = (["efficientformer_l1"], ["float32"], [1])


def main(arguments: argparse.Namespace) -> int:
    device = torch_device(arguments.device)
    machine = machine_of(device)
    models, dtypes, batch_sizes = ON_GPU if machine.is_gpu else ON_CPU
    dtypes = arguments.dtype or dtypes
    path = folder(machine, arguments.output) / "kernels.jsonl"
    todo = kernels.cells(
        arguments.model or models,
        arguments.op,
        [DTYPES[name] for name in dtypes],
        arguments.batch_size or batch_sizes,
    )
    done = kernels.recorded_cells(read_records(path), machine)
    left = [check for check in todo if kernels.key_of(check) not in done]
    print("  ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"{device} ({machine.gpu}), commit {machine.commit}; records go to {path}")
    if not machine.is_gpu:
        print("CPU run: says nothing about a GPU")
    print(f"{len(left)} of {len(todo)} cells are to be measured\n{kernels.HEAD}", flush=True)
    seconds = max(60 * arguments.minutes - MARGIN, 0.5 * 60 * arguments.minutes)
    wrong: list[str] = []
    finished = True
    try:
        for records in kernels.bench(left, device, machine, seconds=seconds, attempts=kernels.begun(machine)):
            if records is None:
                finished = False
                print("the time is over: the same command goes on from here")
                break
            append_records(path, records)
            wrong += kernels.failures(records)
            print("\n".join(kernels.lines(records)), flush=True)
    except kernels.DeviceLostError as error:
        finished = False
        print(f"effformer: {error}; the same command goes on without it", file=sys.stderr)
    for line in wrong:
        print(f"FAIL {line}", file=sys.stderr)
    return 1 if wrong else 0 if finished else os.EX_TEMPFAIL
