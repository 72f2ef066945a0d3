"""Dynamic counts: instructions by class, traffic of global and shared memory, work of the matrix units."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .numbers import Array

if TYPE_CHECKING:
    from .machine import Block, Machine
    from .program import Instruction

_CLASSES = {
    "ex2": "mufu", "rsqrt": "mufu", "sqrt": "mufu", "rcp": "mufu", "lg2": "mufu", "tanh": "mufu", "sin": "mufu",
    "cos": "mufu", "mma": "tensor", "elect": "control", "mbarrier": "sync", "ldmatrix": "lds", "stmatrix": "sts",
    "shfl": "shfl", "bar": "sync", "barrier": "sync", "fence": "sync", "bra": "control", "ret": "control",
    "exit": "control", "cvt": "cvt", "mov": "mov", "cvta": "mov", "setp": "int", "selp": "int", "atom": "stg",
    "red": "stg",
}  # fmt: skip
CLASSES = ("int", "fp32", "mufu", "cvt", "mov", "ldg", "stg", "ldgsts", "lds", "sts", "tensor", "tmem", "shfl", "sync",
           "control")  # fmt: skip


def class_of(instruction: Instruction) -> str:
    """The class that an instruction counts as, one of `CLASSES`."""
    parts = instruction.name.split(".")
    head, last = parts[0], parts[-1]
    if head == "ld":
        return "mov" if "param" in parts else "lds" if any(p.startswith("shared") for p in parts) else "ldg"
    if head == "st":
        return "sts" if any(p.startswith("shared") for p in parts) else "stg"
    if head == "cp":
        return "sync" if parts[2] in ("commit_group", "wait_group", "wait_all") else "ldgsts"
    if head == "wgmma":
        return "tensor" if parts[1] == "mma_async" else "sync"
    if head == "tcgen05":
        return {"mma": "tensor", "ld": "tmem", "st": "tmem"}.get(parts[1], "sync")
    if head in _CLASSES:
        return _CLASSES[head]
    if last in ("f32", "f32x2", "bf16x2", "f16x2", "bf16", "f16", "f64"):
        return "mufu" if head == "div" else "fp32"
    return "int"


@dataclass
class Traffic:
    """Traffic of one memory instruction: `units` are sectors of 32 bytes, or wavefronts of shared memory.

    `ideal` is the least that could hold the distinct bytes of each warp.
    """

    units: int = 0
    ideal: int = 0


class Counts:
    """Sums over all programs that ran."""

    def __init__(self, *, on: bool) -> None:
        self.on = on
        self.flops = 0  # of the matrix units
        self.operand_bytes = 0  # that they read from shared memory
        self._blocks: Counter[int] = Counter()
        self._of_block: dict[int, Block] = {}
        self._global: defaultdict[Instruction, Traffic] = defaultdict(Traffic)
        self._shared: defaultdict[Instruction, Traffic] = defaultdict(Traffic)

    def entered(self, block: Block, m: Machine) -> None:
        """The warps of the mask carry out a block."""
        warps = m.warps if m.mask is None else int(m.mask.reshape(-1, 32).any(1).sum())
        self._blocks[id(block)] += warps
        self._of_block[id(block)] = block

    def global_access(self, i: Instruction, address: Array, lanes: Array, size: int, m: Machine) -> None:
        """Sectors that each warp touches, and the fewest that could hold its distinct bytes.

        Accesses are aligned to their size, which is 32 bytes or less: each lane's is within one sector.
        """
        if not len(lanes):
            return
        places, distinct = _distinct(_of_warps(address[:, None], lanes, m))
        sectors, fresh = places >> 5, distinct.copy()
        fresh[:, 1:] &= sectors[:, 1:] != sectors[:, :-1]
        traffic = self._global[i]
        traffic.units += int(fresh.sum())
        traffic.ideal += int((-(-distinct.sum(1) * size // 32)).sum())

    def shared_access(self, i: Instruction, address: Array, lanes: Array, size: int, m: Machine) -> None:
        """Passes that the 32 banks need for each group of lanes that is served at once, and the least.

        A pass serves 32 lanes of up to 4 bytes, 16 of 8 or 8 of 16. The least is that of the warp's distinct words: a
        warp whose lanes all read the same 16 bytes counts as 4 passes where 1 would do.
        """
        if not len(lanes):
            return
        words = (address >> 2).astype(np.int32)[:, None] + np.arange(max(size // 4, 1), dtype=np.int32)
        of_warps = _of_warps(words, lanes, m)
        found, distinct = _distinct(of_warps.reshape(-1, 32))  # 32 words of each group
        groups, columns = np.nonzero(distinct)
        banks = np.bincount(groups * 32 + found[groups, columns] % 32, minlength=len(found) * 32)
        traffic = self._shared[i]
        traffic.units += int(banks.reshape(-1, 32).max(1).sum())
        number = (distinct if size <= 4 else _distinct(of_warps)[1]).sum(1)
        traffic.ideal += int((-(-number // 32)).sum())

    def totals(self) -> dict[str, float]:
        """By name: warp instructions of each class, sectors and wavefronts with their ideals, FLOP, operand bytes.

        Instructions are those of the PTX, also where a predicate is off in all lanes of the warp. Atomic additions
        count as written. Wavefronts are those of loads, stores, matrices of 8x8 and `cp.async`; reads of matrix units
        are in the operand bytes.
        """
        found: Counter[str] = Counter(dict.fromkeys(CLASSES, 0))
        for key, times in self._blocks.items():
            block = self._of_block[key]
            for one in [*block.instructions, *([block.end] if block.end else [])]:
                found[class_of(one)] += times
        result: dict[str, float] = dict(found)
        names = "sectors_read", "sectors_written", "wavefronts"
        result |= {prefix + name: 0.0 for name in names for prefix in ("", "ideal_")}
        for one, traffic in self._global.items():
            name = "sectors_written" if class_of(one) == "stg" else "sectors_read"
            result[name] += traffic.units
            result["ideal_" + name] += traffic.ideal
        for traffic in self._shared.values():
            result["wavefronts"] += traffic.units
            result["ideal_wavefronts"] += traffic.ideal
        return result | {"flops": self.flops, "operand_bytes": self.operand_bytes}


def _of_warps(values: Array, lanes: Array, m: Machine) -> Array:
    """[lanes, n] as [warps, 32 * n]; -1 for the lanes that are off."""
    if len(lanes) < m.lanes:
        on = np.zeros(m.lanes, bool)
        on[lanes] = True
        values = np.where(on[:, None], values, values.dtype.type(-1))
    return values.reshape(m.warps, -1)


def _distinct(values: Array) -> tuple[Array, Array]:
    """The rows sorted, and where each value of 0 or more stands first."""
    found = np.sort(values, axis=1)
    first = found >= 0
    first[:, 1:] &= found[:, 1:] != found[:, :-1]
    return found, first
