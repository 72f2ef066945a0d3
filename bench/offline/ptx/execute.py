"""Executes programs of a kernel, some at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from . import schedule
from .faults import Fault, Faults
from .global_memory import GlobalMemory
from .machine import Launch, Machine, Options
from .program import Program

LANES = 8192  # at a time: NumPy's overhead is then small beside the work
SHARED = 4 << 20  # bytes of shared memory at a time; the shadow takes several times as much


@dataclass(frozen=True)
class Outcome:
    """Result of executing a launch, or a part of it.

    Attributes:
        programs: how many ran.
        faults: in the order of their lines.
        counts: `Counts.totals` of all programs; empty unless `Options.count` is set.
    """

    programs: int
    faults: list[Fault]
    counts: dict[str, float]


def execute(
    program: Program,
    launch: Launch,
    memory: GlobalMemory,
    *,
    programs: Sequence[int] | None = None,
    options: Options | None = None,
) -> Outcome:
    """Run programs of a launch on `memory`, which holds the results afterwards.

    Args:
        program: the kernel.
        launch: its grid and parameters.
        memory: all tensors that it may reach.
        programs: linear numbers within the grid, x first; None for all.
        options: how to execute.

    Raises:
        ValueError: for programs outside the grid, or parameters that are not those of the kernel.
        UnknownInstructionError: for an instruction that the machine does not know.
        TimeoutError: for programs that wait for ever.
    """
    options = options or Options()
    x, y, z = launch.grid
    todo = list(range(x * y * z)) if programs is None else list(programs)
    if wrong := [number for number in todo if not 0 <= number < x * y * z]:
        raise ValueError(f"programs: got {wrong[0]}, allowed are 0 to {x * y * z - 1}")
    memory.begin_launch()
    faults, totals = Faults(), Counter[str]()
    at_once = max(1, min(LANES // program.threads, SHARED // max(launch.shared_memory, 1)))
    machines: dict[int, Machine] = {}
    for first in range(0, len(todo), at_once):
        part = todo[first : first + at_once]
        if len(part) not in machines:
            machines[len(part)] = Machine(program, launch, memory, len(part), options, faults)
        schedule.run(machines[len(part)], part)
    for machine in machines.values():
        totals.update(machine.counts.totals() if options.count else {})
    return Outcome(len(todo), faults.all(), dict(totals))
