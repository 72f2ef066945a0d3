"""Programs of large grids that stand for the others, and those that compute what they read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...kernels.launch import Launch
from ...kernels.tiling.device import Device
from .execution import Choice, executing
from .ptx.machine import Options
from .ptx.trace import NotTraceableError, elements_read, programs_writing


def first_middle_last(grid: int) -> list[int]:
    """Numbers of the first, middle and last program."""
    return sorted({0, grid // 2, grid - 1})


def sample(
    run: Callable[[], object], device: Device, last: Callable[[int], Sequence[int]] = first_middle_last
) -> list[Sequence[int] | None]:
    """The programs to run of each launch of `run`: those of the last launch, and all that their input comes from.

    Args:
        run: launches kernels on CPU tensors, the same each time.
        device: that they are compiled for.
        last: from the grid of the last launch to its programs.

    Returns:
        for each launch its programs; None for all, where a kernel's addresses cannot be traced.
    """
    with executing(device, options=Options(watch=False), choose=lambda launch: []) as dry:
        run()
    launches, memory = dry.executed, dry.memory
    wanted = {region.start: np.zeros(region.units, bool) for region in memory.regions if region.output}
    chosen: list[Sequence[int] | None] = []
    for place, one in reversed(list(enumerate(launches))):
        programs: Sequence[int] | None
        try:
            if place == len(launches) - 1:
                programs = last(one.launch.grid)
            else:
                programs = programs_writing(one.program, one.geometry, memory, wanted)
            for start, units in elements_read(one.program, one.geometry, memory, programs).items():
                if start in wanted:
                    wanted[start] |= units
        except NotTraceableError:
            programs = None
            for start in wanted:
                wanted[start][:] = True
        chosen.append(programs)
    return chosen[::-1]


def in_turn(chosen: Sequence[Sequence[int] | None]) -> Choice:
    """A choice that gives each launch, in order, its programs."""
    left = iter(chosen)

    def choose(launch: Launch) -> Sequence[int] | None:
        return next(left)

    return choose
