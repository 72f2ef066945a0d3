"""An estimate of a launch's time by its dynamic counts: at full issue, peak products, bandwidth and banks.

It is arithmetic and no measurement. Launches take longer, by latencies and the last wave. They may also take less:
ptxas drops moves, caches keep what was read, and banks serve some wide accesses at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...kernels.tiling.device import TARGETS
from ..measure.roofline import Ceilings

if TYPE_CHECKING:
    from .counted import Record

BOUNDS = ("issue", "tensor", "memory", "shared")
_ISSUED = 4  # warp instructions a clock of a multiprocessor: one of each scheduler
_BANKS = 128  # bytes a clock of a multiprocessor's shared memory
_RESERVED = 1024  # bytes of shared memory that the system takes for each program
_PROGRAMS, _THREADS = 32, 2048  # of a multiprocessor of sm_80, sm_90 and sm_100


@dataclass(frozen=True)
class Gpu:
    """Peak figures of a GPU.

    Attributes:
        target: "sm_90", whose code it runs.
        multiprocessors: how many it has.
        flop_a_clock: of a multiprocessor's matrix units, in bfloat16 or float16.
        ceilings: products in bfloat16 or float16, dense, and its memory, by the data sheet.
    """

    target: str
    multiprocessors: int
    flop_a_clock: int
    ceilings: Ceilings

    @property
    def clock(self) -> float:
        """Hz: that at which the matrix units reach the data sheet's peak."""
        return self.ceilings.flops / (self.multiprocessors * self.flop_a_clock)


# NVIDIA's data sheets: A100 80GB SXM (2022), H100 SXM (2023), H200 SXM (2024), HGX B200 (a GPU's share, 2024).
# Where they state products with sparsity, half of it.
GPUS = {
    "A100": Gpu("sm_80", 108, 2048, Ceilings(312e12, 2.04e12)),
    "H100": Gpu("sm_90", 132, 4096, Ceilings(989e12, 3.35e12)),
    "H200": Gpu("sm_90", 132, 4096, Ceilings(989e12, 4.8e12)),
    "B200": Gpu("sm_100", 148, 8192, Ceilings(2250e12, 8.0e12)),
}


def gpus_of(target: str) -> list[str]:
    """The names of the GPUs that run a target's code, the usual one first.

    Raises:
        ValueError: for a target that no GPU of `GPUS` has.
    """
    fitting = [name for name, gpu in GPUS.items() if gpu.target == target]
    if not fitting:
        allowed = ", ".join(dict.fromkeys(gpu.target for gpu in GPUS.values()))
        raise ValueError(f"target: got {target!r}, allowed are {allowed}")
    return fitting


def bounds(record: Record, gpu: Gpu) -> dict[str, float]:
    """Seconds of one call of a launch by each of `BOUNDS`, if the work were spread evenly over the whole GPU.

    "issue": PTX's warp instructions, 4 a clock and multiprocessor; machine code has others, most often fewer moves.
    "tensor": FLOP of the matrix units at their peak, half of it for float32 (TF32). "memory": the launch's distinct
    bytes, read plus written, at the memory's bandwidth. "shared": wavefronts, and operands of the matrix units by 128
    bytes, one a clock and multiprocessor.

    Raises:
        ValueError: for a GPU that runs other code.
    """
    if record.target != gpu.target:
        raise ValueError(f"gpu: got one of {gpu.target}, allowed is one of {record.target}")
    clocks = gpu.multiprocessors * gpu.clock
    peak = gpu.ceilings.flops / (2 if record.dtype == "float32" else 1)
    return {
        "issue": record.instructions / (_ISSUED * clocks),
        "tensor": record.flops / peak,
        "memory": (record.distinct_read + record.distinct_written) / gpu.ceilings.bandwidth,
        "shared": (record.wavefronts + record.operand_bytes / _BANKS) / clocks,
    }


def bound(record: Record, gpu: Gpu) -> tuple[str, float]:
    """The largest of `bounds` with its name: the estimate of one call's time."""
    found = bounds(record, gpu)
    name = max(found, key=lambda each: found[each])
    return name, found[name]


def estimate(records: Iterable[Record], gpu: Gpu) -> float:
    """Seconds of a network's launches one after another, each at its largest bound."""
    return sum(record.count * bound(record, gpu)[1] for record in records)


def programs_that_fit(target: str, shared_memory: int, warps: int) -> int:
    """Programs that a multiprocessor holds at once by shared memory (bytes of a program) and by threads alone.

    Registers and tensor memory may allow fewer: ptxas gives the registers, and it is not run here.
    """
    most = TARGETS[int(target.removeprefix("sm_"))].shared_memory + _RESERVED  # bytes of a multiprocessor
    return min(most // (shared_memory + _RESERVED), _THREADS // (32 * warps), _PROGRAMS)


def waves(target: str, grid: int, fitting: int) -> dict[str, float]:
    """By GPU of the target: a grid as a multiple of the programs that it holds at once, `fitting` a multiprocessor."""
    return {name: round(grid / (GPUS[name].multiprocessors * max(fitting, 1)), 2) for name in gpus_of(target)}
