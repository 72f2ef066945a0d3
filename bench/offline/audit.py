"""Compile every kernel with every shipped configuration for every GPU type, and check the outcome by rules.

`python -m effformer.bench.offline.audit` (`make audit`) prints a table and writes a JSON record a compiled kernel. It
fails on spills inside a loop, more shared memory than the GPU has, matrix products off the tensor cores, products that
Hopper's compiler serialises, orders of instructions that are wrong (`hazards`), and configurations that are missing or
never compiled. It needs no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import triton

from ...config import PRESETS
from ...files import write_whole
from ...kernels.launch import Launch
from ...kernels.tiling import choose as config
from ...kernels.tiling.choose import user_file
from ...kernels.tiling.device import CLASSES, TARGETS, Device, device_class
from ...kernels.tiling.table import DTYPES, Entry, Table, read_table
from ...testing import float32_as_such, with_tf32
from .compile import TENSOR_CORES, Compiled, Source, compile_source, source_of
from .launches import network_launches, unusual_launches
from .workers import compilers, cores

SIZES = ((224, 224), (512, 640))
BATCHES = (256, 64, 8, 2, 1)

_PRODUCTS = (
    "conv_norm_kernel",
    "mlp_kernel",
    "mlp_backward_kernel",
    "split_mlp_kernel",
    "linear_kernel",
    "bias_attention_kernel",
    "gram_kernel",
    "attention_backward_kernel",
    "attention_rows_backward_kernel",
    "attention_tokens_backward_kernel",
    "attention_bias_backward_kernel",
)


@dataclass
class Job:
    """One kernel to compile for a device, for all the shapes that share it.

    `configuration` is that of the launch. `hidden` counts the hidden elements that a program's hot loop makes in one
    round: 0 for most kernels.
    """

    operation: str
    shapes: list[str]
    dtype: str
    device: Device
    source: Source
    configuration: dict[str, Any]
    hidden: int

    @classmethod
    def of(cls, operation: str, shapes: list[str], dtype: str, device: Device, launch: Launch) -> Job:
        """The job of compiling `launch`."""
        hidden = launch.constants.get("BLOCK_M", 0) * launch.constants.get("BLOCK_H", 0)
        source = source_of(launch, device.capability)
        return cls(operation, shapes, dtype, device, source, launch.configuration, hidden)

    @property
    def kernel(self) -> str:
        return self.source.kernel.partition(":")[2]


@dataclass(frozen=True)
class Record:
    """The outcome of a job and its faults; a line of `audit.jsonl`.

    Attributes:
        shared_memory_limit: bytes that a program may have on the target.
        tensor_core: the instruction of the target; `compiled.tensor_cores` counts those in the kernel.
        instructions_per_hidden, mufu_per_hidden: instructions (of a thread) in the hot loop for each hidden element;
            None for kernels whose loop makes none.
        faults: the rules that do not hold.
    """

    operation: str
    kernel: str
    shapes: list[str]
    dtype: str
    target: str
    configuration: dict[str, Any]
    compiled: Compiled | None
    shared_memory_limit: int
    tensor_core: str
    serialised: bool
    instructions_per_hidden: float | None
    mufu_per_hidden: float | None
    faults: list[str]
    triton: str


def jobs(
    models: Sequence[str],
    targets: Sequence[int],
    dtypes: Sequence[str],
    *,
    extra: Sequence[Entry] = (),
    part: bool = False,
) -> tuple[list[Job], list[str]]:
    """The jobs, and lines on shapes without a configuration and configurations without a shape.

    Kernels that differ only in the sizes that are multiples of 16 count as one: the first, with the published sizes and
    256 images. Entries for a single size hide general ones, which other networks get: these are compiled as well.
    Unused configurations are reported where all models are audited. `extra` entries come before the shipped ones.
    `part`: 256 images and one, of 224 by 224 pixels.
    """
    found: dict[str, Job] = {}
    missing: list[str] = []
    whole = Table([*extra, *config.shipped_table().entries])
    general = [entry for entry in whole.entries if not entry.exact]
    tables = [whole, Table(general)] if len(general) < len(whole.entries) else [whole]
    for target in targets:
        device = TARGETS[target]
        for dtype in dtypes:
            for table, flags in itertools.product(tables, _flags(dtype)):
                with config.using(table), flags():
                    for owner, launches in _launches(models, DTYPES[dtype], device, part):
                        try:
                            for operation, shape, launch in launches:
                                job = Job.of(operation, [], dtype, device, launch)
                                same = found.setdefault(job.source.without_attributes, job)
                                same.shapes.append(f"{owner} {operation} {shape}")
                        except LookupError as error:
                            missing.append(f"sm_{target}: {owner}: {error}")
            if len(models) == len(PRESETS) and not part:
                name, used = device_class(device), {use for table in tables for use in table.used}
                for entry in whole.entries:
                    concerned = name in entry.devices and DTYPES[dtype] in entry.dtypes
                    if concerned and (entry, name, DTYPES[dtype]) not in used:
                        missing.append(f"sm_{target}: {entry.source} ({dtype}): no audited shape uses it")
    return list(found.values()), missing


def _flags(dtype: str) -> Sequence[Callable[[], contextlib.AbstractContextManager[None]]]:
    """PyTorch's settings to describe launches under: as it starts; for float32 also without any TF32, and with it."""
    if dtype != "float32":
        return (contextlib.nullcontext,)
    return contextlib.nullcontext, float32_as_such, with_tf32


def _launches(
    models: Sequence[str], dtype: torch.dtype, device: Device, part: bool
) -> Iterator[tuple[str, Iterator[tuple[str, str, Launch]]]]:
    for name in models:
        for size in SIZES[:1] if part else SIZES:
            for batch in (256, 1) if part else BATCHES:
                yield name.rpartition("_")[2].upper(), network_launches(name, dtype, device, batch=batch, size=size)
    yield "unusual", unusual_launches(dtype, device)


def audit(job: Job, cache: Path | None = None) -> Record:
    """Compile a job and judge it."""
    limit, core = job.device.shared_memory, TENSOR_CORES[CLASSES[device_class(job.device)].capability]
    compiled, per_element, mufu = None, None, None
    try:
        compiled = compile_source(job.source, cache)
    except Exception as error:  # Triton raises many kinds
        lines = str(error).strip().splitlines() or [""]
        faults = [f"does not compile: {type(error).__name__}: {lines[0][:200]}"]
    else:
        faults = list(_faults(job, compiled, limit, core))
        if job.hidden:
            threads = 32 * job.source.options["num_warps"] / job.hidden
            # GELU takes one of the multi-function unit: a loop with twice as many makes two tiles a round.
            rounds = max(1, round(compiled.loop_mufu * threads))
            per_element, mufu = compiled.loop_instructions * threads / rounds, compiled.loop_mufu * threads / rounds
    return Record(
        operation=job.operation,
        kernel=job.kernel,
        shapes=job.shapes,
        dtype=job.dtype,
        target=f"sm_{job.device.capability}",
        configuration=job.configuration,
        compiled=compiled,
        shared_memory_limit=limit,
        tensor_core=core,
        serialised=compiled is not None and compiled.serialised,
        instructions_per_hidden=per_element,
        mufu_per_hidden=mufu,
        faults=faults,
        triton=triton.__version__,
    )


def _faults(job: Job, compiled: Compiled, limit: int, core: str) -> Iterator[str]:
    if compiled.loop_spills:
        yield f"{compiled.loop_spills} spills inside the loop"
    elif job.kernel == "linear_kernel" and not compiled.loop_instructions and compiled.spills:
        yield f"{compiled.spills} spills, and the loop is unrolled"
    if compiled.shared_memory > limit:
        yield f"{compiled.shared_memory} bytes of shared memory, and the GPU has {limit}"
    if job.kernel in _PRODUCTS and (job.dtype != "float32" or job.source.constants.get("PRECISION") != "ieee"):
        # Warpgroups and tensor memory work on 64 rows and more: smaller tiles take the older instruction.
        cores = (core,) if job.configuration["BLOCK_M"] >= 64 else (core, "HMMA")
        if not any(name in compiled.tensor_cores for name in cores):
            yield f"no {core}: its matrix products are not on the target's tensor cores"
    yield from compiled.hazards
    if compiled.serialised:
        yield f"serialised products: {compiled.waits} waits for {compiled.products} in the loop"


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the audit and return the exit status: 1 if there are faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=sorted(PRESETS), choices=sorted(PRESETS), metavar="MODEL")
    parser.add_argument("--targets", nargs="+", type=int, default=list(TARGETS), choices=TARGETS, metavar="SM")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES, metavar="DTYPE")
    parser.add_argument("--part", action="store_true", help="batches of 256 and 1 at 224 by 224: for other Tritons")
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="these alone, such as layer_norm_kernel")
    parser.add_argument("--entries", type=Path, metavar="FILE", help="a table whose entries come before the shipped")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the records there, a line each")
    parser.add_argument("--no-cache", action="store_true", help="compile everything anew")
    parser.add_argument("--workers", type=int, default=cores(), metavar="N", help="default: %(default)s")
    arguments = parser.parse_args(argv)

    extra = read_table(arguments.entries) if arguments.entries else []
    todo, missing = jobs(arguments.models, arguments.targets, arguments.dtypes, extra=extra, part=arguments.part)
    if arguments.kernels:
        names = {job.kernel for job in todo}
        if unknown := [name for name in arguments.kernels if name not in names]:
            parser.error(f"--kernels: got {unknown[0]!r}, allowed are {', '.join(sorted(names))}")
        todo, missing = [job for job in todo if job.kernel in arguments.kernels], []
    cache = None if arguments.no_cache else user_file().parent / "audit"
    print(f"triton {triton.__version__}, {len(todo)} kernels", flush=True)
    print(_row(*_COLUMNS))
    records = []
    with compilers(arguments.workers) as pool:
        for record in pool.map(audit, todo, [cache] * len(todo)):
            records.append(record)
            print(_describe(record), flush=True)
    if arguments.output:
        write_whole(arguments.output, "".join(json.dumps(asdict(record)) + "\n" for record in records))
    print()
    print("\n".join(_worst(records)))
    failed = [record for record in records if record.faults]
    print(f"\n{len(records)} kernels, {len(failed)} with faults, {len(missing)} configurations missing or unused")
    for record in failed:
        configuration = ", ".join(f"{name}={value}" for name, value in record.configuration.items())
        print(f"{record.target} {record.dtype} {record.kernel} of {record.shapes[0]}, {configuration}:")
        print("    " + "; ".join(record.faults))
    for line in missing:
        print(line)
    return 1 if failed or missing else 0


_COLUMNS = ("target", "dtype", "kernel", "first of the shapes", "regs", "st/ld", "loop", "shared", "cores", "instr.",
            "loop", "a hidden", "MUFU")  # fmt: skip
_WIDTHS = (6, 8, 21, 39, 4, 7, 4, 6, 12, 6, 5, 8, 4)


def _row(*values: object) -> str:
    return "  ".join(f"{value!s:<{width}}" for value, width in zip(values, _WIDTHS, strict=True)).rstrip()


def _describe(record: Record) -> str:
    start = record.target, record.dtype, record.kernel, record.shapes[0]
    found = record.compiled
    if found is None:
        return _row(*start, *["-"] * 9) + "  " + "; ".join(record.faults)
    cores = " ".join(f"{number} {name}" for name, number in found.tensor_cores.items()) or "none"
    hidden = [
        "-" if value is None else f"{value:.1f}" for value in (record.instructions_per_hidden, record.mufu_per_hidden)
    ]
    spills = f"{found.spill_stores}/{found.spill_loads}"
    row = (*start, found.registers, spills, found.loop_spills, found.shared_memory, cores, found.instructions)
    return f"{_row(*row, found.loop_instructions, *hidden)}  {'; '.join(record.faults)}".rstrip()


def _worst(records: Sequence[Record]) -> Iterator[str]:
    """The largest figures of each target, each with its kernel, dtype and shape."""
    compiled = [record for record in records if record.compiled]
    for target in dict.fromkeys(record.target for record in compiled):
        for name in ("registers", "spills", "shared_memory"):
            figure = attrgetter(f"compiled.{name}")
            record = max((one for one in compiled if one.target == target), key=figure)
            limit = f" of {record.shared_memory_limit}" if name == "shared_memory" else ""
            where = f"{record.kernel}, {record.dtype}, {record.shapes[0]}"
            yield f"{target:<6} worst {name.replace('_', ' '):<13} {figure(record)}{limit}  ({where})"


if __name__ == "__main__":
    sys.exit(main())
