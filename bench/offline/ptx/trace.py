"""Which global memory programs touch, without their arithmetic.

Only the part of a kernel that its accesses depend on is carried out (`slices`). This is cheap enough for whole grids,
and tells which programs another one takes its input from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .execute import execute
from .global_memory import GlobalMemory, Region, Touch
from .machine import Launch, Machine
from .numbers import UNSIGNED, Array
from .program import Instruction, Program
from .registry import Step, instruction
from .slices import sliced

if TYPE_CHECKING:
    from collections.abc import Iterable


def elements_read(program: Program, launch: Launch, memory: GlobalMemory, programs: Sequence[int]) -> dict[int, Array]:
    """The units that programs read: start of a region -> bool [units].

    Raises:
        NotTraceableError: as `sliced` does.
    """
    found = {region.start: np.zeros(region.units, bool) for region in memory.regions}

    def touch(written: bool, ids: Array, addresses: Array, size: int) -> None:
        if not written:
            for region, places, _ in _by_region(memory, addresses, size):
                found[region.start][places] = True

    _trace(program, launch, memory, programs, touch)
    return found


def programs_writing(program: Program, launch: Launch, memory: GlobalMemory, wanted: dict[int, Array]) -> list[int]:
    """The programs of a launch that write any of the units (as `elements_read` gives them).

    Raises:
        NotTraceableError: as `sliced` does.
    """
    chosen = np.zeros(int(np.prod(launch.grid)), bool)

    def touch(written: bool, ids: Array, addresses: Array, size: int) -> None:
        if written:
            for region, places, lanes in _by_region(memory, addresses, size):
                if region.start in wanted:
                    chosen[ids[lanes][wanted[region.start][places].any(1)]] = True

    _trace(program, launch, memory, range(len(chosen)), touch)
    return [int(number) for number in np.flatnonzero(chosen)]


def write_counts(program: Program, launch: Launch, memory: GlobalMemory) -> dict[int, Array]:
    """How often all programs of a launch write each unit: start of a region -> uint8 [units].

    Raises:
        NotTraceableError: as `sliced` does.
    """
    found = {one.start: np.zeros(-(-one.units // 8) * 8, np.uint8) for one in memory.regions if one.output}

    def touch(written: bool, ids: Array, addresses: Array, size: int) -> None:
        for region, places, _ in _by_region(memory, addresses, size) if written else ():
            if region.output:  # the units of an access are aligned, and counted together
                kind = UNSIGNED[places.shape[1]]
                one = kind(0x0101010101010101 & (1 << 8 * places.shape[1]) - 1)
                np.add.at(found[region.start].view(kind), places[:, 0] // places.shape[1], one)

    _trace(program, launch, memory, range(int(np.prod(launch.grid))), touch)
    return {region.start: found[region.start][: region.units] for region in memory.regions if region.output}


def _by_region(memory: GlobalMemory, addresses: Array, size: int) -> Iterable[tuple[Region, Array, Array]]:
    """(region, units [n, k], which of the addresses)."""
    for region in memory.regions:
        lanes = np.flatnonzero((addresses >= region.start) & (addresses + size <= region.end))
        if len(lanes):
            first = (addresses[lanes] - region.start)[:, None] // region.unit
            yield region, first + np.arange(-(-size // region.unit)), lanes


def _trace(program: Program, launch: Launch, memory: GlobalMemory, programs: Sequence[int], touch: Touch) -> None:
    memory.touch = touch
    try:
        execute(sliced(program), launch, memory, programs=programs)
    finally:
        memory.touch = None


@instruction(r"trace\.(?P<kind>read|write)\.(?P<size>\d+)")
def trace(m: Machine, i: Instruction, kind: str, size: str) -> Step:
    """Report the addresses of the lanes that are on; a second operand of 0 switches a copy off."""
    address, touch = m.address(i.operands[0], "b64"), m.memory.touch
    assert touch is not None
    given = m.source(i.operands[1], "b32") if len(i.operands) > 1 else None

    def run() -> None:
        active = m.active(i)
        on = np.ones(m.lanes, bool) if active is None else active
        if given is not None:
            on = on & (m.registers[given] != 0)
        lanes = np.flatnonzero(on)
        if len(lanes):
            touch(kind == "write", m.ids[m.program_of[lanes]], address()[lanes], int(size))

    return run, []
