"""Dynamic counts of the launches of networks: a few programs of each are executed, and stand for the others.

The kernels are executed as compiled for a GPU that is not here. Values do not matter: launches run alone, on memory
that holds anything. `bench/results/counts.jsonl` keeps the records.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ...apps.verify_report import describe_dtype
from ...config import PRESETS
from ...files import write_whole
from ...kernels.launch import Launch, is_output
from ...kernels.tiling.device import TARGETS
from ...testing import Case, draw_case, float32_as_such
from ...workload import Work, network_work
from .bounds import gpus_of, programs_that_fit, waves
from .execution import Executed, Execution, executing
from .ptx.counts import CLASSES
from .ptx.execute import execute
from .ptx.global_memory import SECTOR
from .ptx.machine import Options
from .ptx.numbers import Array

FILE = Path("bench/results/counts.jsonl")
UPDATE = "effformer bench counts --update"
GROWTH = 0.03  # by which a figure may grow before the records must be updated
WHOLE = 8  # programs of a grid that runs as a whole
_PLACES = (2 / 11, 4 / 11, 7 / 11, 9 / 11)  # in a larger one, of programs that stand for all but the first and last
_OPTIONS = Options(watch=False, count=True)


@dataclass(frozen=True)
class Record:
    """The counts of one launch of an operation of a network; a line of `counts.jsonl`.

    Figures are those of the whole grid, for one call. Where only some programs ran they are scaled (`sample`).

    Attributes:
        model, part, operation: of `effformer.workload`, the part as its `Work` has it.
        count: calls of the operation in one forward.
        batch: images.
        shape: of the operation's input.
        dtype: of input and weights.
        target: "sm_90".
        number: of the launch within the operation, from 0.
        kernel: its name.
        configuration: tiles, warps and stages.
        grid: programs.
        warps: of a program.
        programs: that ran.
        by_class: warp instructions of the PTX by class (`ptx.counts.CLASSES`); those that are 0 are left out.
        sectors_read, sectors_written: of 32 bytes, that warps asked for, each instruction by itself.
        ideal_sectors_read, ideal_sectors_written: the fewest that could hold the distinct bytes of each instruction.
        distinct_read, distinct_written: bytes of the launch. Measured, as distinct sectors, where all programs ran;
            else those of all elements of its tensors: our kernels read each element of their inputs and write each of
            their outputs. Sectors beyond them are repeated loads, of other programs or within one.
        sampled_read, sampled_written: bytes of the distinct sectors of the programs that ran, not scaled.
        wavefronts: passes of the banks of shared memory for warps.
        ideal_wavefronts: the fewest for the distinct words of each instruction.
        operand_bytes: that products of warpgroups and in tensor memory read from shared memory themselves.
        flops: of the matrix units, two a multiplication, those with padding of tiles included.
        shared_memory: bytes of a program.
        fitting: programs that a multiprocessor holds by shared memory and threads alone; registers may allow fewer.
        waves: by GPU (`bounds.GPUS`), the grid as a multiple of the programs that it then holds at once.
        triton: its version.
    """

    model: str
    part: str
    operation: str
    count: int
    batch: int
    shape: tuple[int, ...]
    dtype: str
    target: str
    number: int
    kernel: str
    configuration: dict[str, Any]
    grid: int
    warps: int
    programs: int
    by_class: dict[str, int]
    sectors_read: int
    ideal_sectors_read: int
    sectors_written: int
    ideal_sectors_written: int
    distinct_read: int
    distinct_written: int
    sampled_read: int
    sampled_written: int
    wavefronts: int
    ideal_wavefronts: int
    operand_bytes: int
    flops: int
    shared_memory: int
    fitting: int
    waves: dict[str, float]
    triton: str

    @property
    def instructions(self) -> int:
        """Warp instructions of all classes."""
        return sum(self.by_class.values())

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for records of the same launch of a network."""
        return self.network, self.part, self.operation, self.number

    @property
    def network(self) -> tuple[str, int, str, str]:
        """Model, batch, dtype and target."""
        return self.model, self.batch, self.dtype, self.target


# --- the programs that run --------------------------------------------------------------------------------------------


def sample(grid: int) -> list[tuple[float, list[int]]]:
    """Programs to run, and how many of the grid each stands for.

    All programs of a small grid; else the first and the last, which stand for themselves, and four between, which stand
    for all others. These are near `_PLACES`, within an image at usual batches, and leave different remainders by 4:
    tiles of columns lie side by side, and the last of them may be partly empty. Of L1's launches at batches 1 and 4,
    whole grids had the same instructions, wavefronts and FLOP, and sectors within 6 %: the last tile of rows has fewer.
    """
    if grid <= WHOLE:
        return [(1, list(range(grid)))]
    between: list[int] = []
    for place in _PLACES:
        used = {one % len(_PLACES) for one in between}
        free = [one for one in range(1, grid - 1) if one % len(_PLACES) not in used]
        between.append(min(free, key=lambda one: abs(one - grid * place)))
    return [(1, [0, grid - 1]), ((grid - 2) / len(between), between)]


# --- measuring --------------------------------------------------------------------------------------------------------


def count_network(
    model: str,
    batch: int,
    dtype: torch.dtype,
    capability: int,
    *,
    size: tuple[int, int] = (224, 224),
    wanted: Callable[[Work], bool] = lambda work: True,
) -> Iterator[Record]:
    """Count the launches of a network's operations, one record each, in its order; equal launches are executed once.

    Args:
        model: the name of a published network.
        batch: images, 1 or more.
        dtype: of input and weights.
        capability: of a GPU of `bounds.GPUS`, 90 for sm_90.
        size: height and width of the images.
        wanted: which of the network's work to count.

    Raises:
        RuntimeError: where kernels cannot be executed (see `executing`), and where one is found at fault.
        ValueError: for another capability, or a batch size below 1.
    """
    target = f"sm_{capability}"
    gpus_of(target)
    known: dict[str, dict[str, Any]] = {}
    for work in network_work(PRESETS[model], batch, size):
        if not work.count or not wanted(work):
            continue
        case = _case(work, dtype)
        with (
            float32_as_such(),
            executing(TARGETS[capability], options=Options(watch=False), choose=lambda launch: []) as dry,
        ):
            case.run("triton")
        for number, one in enumerate(dry.executed):
            if (key := _key(one.launch)) not in known:
                known[key] = _count(one, dry, target)
            yield Record(
                model=model,
                part=work.part,
                operation=work.operation,
                count=work.count,
                batch=batch,
                shape=work.shape,
                dtype=describe_dtype(dtype),
                target=target,
                number=number,
                triton=triton.__version__,
                **known[key],
            )


def _case(work: Work, dtype: torch.dtype) -> Case:
    """A call with an uninitialised input; images lie as users have them, other maps channels_last."""
    small = draw_case(work.operation, (1, *work.shape[1:]), dtype, **work.options)
    if len(work.shape) == 4 and work.part != "stem, 1st":
        batch, channels, height, width = work.shape
        x = torch.empty(batch, height, width, channels, dtype=dtype).permute(0, 3, 1, 2)
    else:
        x = torch.empty(work.shape, dtype=dtype)
    return replace(small, arguments=(x, *small.arguments[1:]))


def _key(launch: Launch) -> str:
    """Equal for launches that differ in the addresses of their tensors alone."""
    arguments = {
        name: (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value
        for name, value in launch.arguments.items()
    }
    return repr((launch.kernel.__name__, launch.grid, arguments, launch.constants, launch.options))


def _count(one: Executed, execution: Execution, target: str) -> dict[str, Any]:
    """The fields of a record that are the launch's own."""
    launch, memory, totals = one.launch, execution.memory, Counter[str]()
    execution.allow(launch)
    sectors: dict[tuple[int, str], Array] = {}  # by the region's place in memory
    chosen = sample(launch.grid)
    for weight, programs in chosen:
        outcome = execute(one.program, one.geometry, memory, programs=programs, options=_OPTIONS)
        if outcome.faults:
            raise RuntimeError(f"{launch.kernel.__name__}: {outcome.faults[0]}")
        totals.update({name: weight * value for name, value in outcome.counts.items()})
        for place, region in enumerate(memory.regions):
            for name in ("read", "write"):
                touched = getattr(region, f"{name}_sectors")
                known = sectors.get((place, name))
                sectors[place, name] = touched if known is None else known | touched
    read, written = (
        SECTOR * sum(int(found.sum()) for (_, kind), found in sectors.items() if kind == name)
        for name in ("read", "write")
    )
    whole, warps = launch.grid <= WHOLE, one.program.threads // 32
    fitting = programs_that_fit(target, one.geometry.shared_memory, warps)
    figures = {name: round(value) for name, value in totals.items() if name not in CLASSES}
    return figures | {
        "kernel": launch.kernel.__name__,
        "configuration": launch.configuration,
        "grid": launch.grid,
        "warps": warps,
        "programs": sum(len(programs) for _, programs in chosen),
        "by_class": {name: round(totals[name]) for name in CLASSES if totals[name]},
        "distinct_read": read if whole else tensor_bytes(launch, written=False),
        "distinct_written": written if whole else tensor_bytes(launch, written=True),
        "sampled_read": read,
        "sampled_written": written,
        "shared_memory": one.geometry.shared_memory,
        "fitting": fitting,
        "waves": waves(target, launch.grid, fitting),
    }


def tensor_bytes(launch: Launch, *, written: bool) -> int:
    """Bytes of the distinct elements of a launch's inputs, or of its outputs."""
    found = {}
    for name, tensor in launch.arguments.items():
        if not isinstance(tensor, Tensor):
            continue
        if is_output(name) if written else not is_output(name) or launch.constants.get("ATOMIC"):
            sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
            found[tensor.data_ptr()] = int(torch.Size(sizes).numel()) * tensor.element_size()
    return sum(found.values())


# --- records ----------------------------------------------------------------------------------------------------------


def read_records(path: Path = FILE) -> list[Record]:
    """The records of a file; none where there is no file.

    Raises:
        ValueError: for a file of another kind.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        found = json.loads(line)
        if not isinstance(found, dict) or set(found) != {field.name for field in fields(Record)}:
            raise ValueError(f"{path}, line {number}: allowed are the fields of a record: {UPDATE}")
        records.append(Record(**{**found, "shape": tuple(found["shape"])}))
    return records


def write_records(new: Sequence[Record], path: Path = FILE) -> None:
    """Write records, whole or not at all: those of a network in place of its former ones, in a fixed order."""
    fresh = {record.network for record in new}
    kept = [record for record in read_records(path) if record.network not in fresh]
    ordered = sorted([*kept, *new], key=lambda record: (record.model, -record.batch, record.dtype, record.target))
    write_whole(path, "".join(json.dumps(asdict(record)) + "\n" for record in ordered))


COMPARED = ("instructions", "sectors_read", "sectors_written", "wavefronts", "flops")


def grown(recorded: Iterable[Record], measured: Iterable[Record]) -> list[str]:
    """Lines for figures that grew by more than 3 % over the records, and for launches without a record."""
    known, found = {record.key: record for record in recorded}, []
    for record in measured:
        name = f"{record.kernel} of {record.operation} {list(record.shape)} ({record.part}, {record.target})"
        before = known.get(record.key)
        if before is None:
            found.append(f"{name}: it has no record: {UPDATE}")
            continue
        for figure in COMPARED:
            old, new = getattr(before, figure), getattr(record, figure)
            if new > (1 + GROWTH) * old:
                found.append(f"{name}: {figure} grew from {old:,} to {new:,}; if that is meant: {UPDATE}")
    return found
