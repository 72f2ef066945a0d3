"""Programs of large grids that stand for the others, and those that compute what they read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...kernels.launch import Launch
from ...kernels.tiling.device import Device
from .execution import Choice, executing, wrong_writes
from .ptx.faults import Fault
from .ptx.machine import Options
from .ptx.slices import NotTraceableError
from .ptx.trace import elements_read, programs_writing, write_counts


def first_middle_last(grid: int) -> list[int]:
    """Numbers of the first, middle and last program."""
    return sorted({0, grid // 2, grid - 1})


@dataclass(frozen=True)
class Sample:
    """The programs to run of each launch; None for all, where a kernel's addresses cannot be traced.

    Attributes:
        programs: of each launch.
        faults: of each launch, where all of its programs together do not write the outputs as they should.
    """

    programs: list[Sequence[int] | None]
    faults: list[list[Fault]]


def sample(
    run: Callable[[], object],
    device: Device,
    last: Callable[[int], Sequence[int]] = first_middle_last,
    *,
    whole: bool = True,
) -> Sample:
    """The programs of the last launch that stand for the others, and all that their input comes from.

    Args:
        run: launches kernels on CPU tensors, the same each time.
        device: that they are compiled for.
        last: from the grid of the last launch to its programs.
        whole: whether to look at the writes of all programs: a minute for a million of them.
    """
    with executing(device, options=Options(watch=False), choose=lambda launch: []) as dry:
        run()
    memory = dry.memory
    wanted = {region.start: np.zeros(region.units, bool) for region in memory.regions if region.output}
    chosen: list[Sequence[int] | None] = []
    faults: list[list[Fault]] = []
    for place, one in reversed(list(enumerate(dry.executed))):
        programs: Sequence[int] | None
        found: list[Fault] = []
        try:
            if place == len(dry.executed) - 1:
                programs = last(one.launch.grid)
            else:
                programs = programs_writing(one.program, one.geometry, memory, wanted)
            for start, units in elements_read(one.program, one.geometry, memory, programs).items():
                if start in wanted:
                    wanted[start] |= units
            if whole:
                counts = write_counts(one.program, one.geometry, memory)
                found = wrong_writes(one.launch, one.outputs, lambda region: counts[region.start])  # noqa: B023
        except NotTraceableError:
            programs = None  # all of them run, and are watched
            for start in wanted:
                wanted[start][:] = True
        chosen.append(programs)
        faults.append(found)
    return Sample(chosen[::-1], faults[::-1])


def in_turn(chosen: Sequence[Sequence[int] | None]) -> Choice:
    """A choice that gives each launch, in order, its programs."""
    left = iter(chosen)

    def choose(launch: Launch) -> Sequence[int] | None:
        return next(left)

    return choose
