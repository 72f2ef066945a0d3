"""Barriers in shared memory (`mbarrier`), which products of `tcgen05` arrive at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .numbers import Array
from .registry import Step, UnknownInstructionError, instruction
from .shared_memory import SHARED_BASE

if TYPE_CHECKING:
    from .machine import Machine
    from .program import Instruction

_PATIENCE = 1000  # polls in a row without any other progress


@dataclass
class Barrier:
    """A barrier: phases that are complete, arrivals to come in this one, arrivals of a phase."""

    phase: int
    missing: int
    expected: int

    def arrive(self, count: int = 1) -> None:
        self.missing -= count
        if self.missing <= 0:
            self.phase, self.missing = self.phase + 1, self.missing + self.expected


class Barriers:
    """The barriers of all programs, by program and address, and the threads that wait."""

    def __init__(self, m: Machine) -> None:
        self.m = m
        self.known: dict[tuple[int, int], Barrier] = {}
        self._asked: dict[tuple[int, int], set[int]] = {}  # -> warps that have polled once
        self._yielding = np.zeros(m.lanes, bool)
        self._polls = 0

    def own(self, address: Array, active: Array | None, owned: bool) -> None:
        """Ordinary stores to the 8 bytes of a barrier are faults until it is given up."""
        shared, lanes = self.m.shared, self.m.lane if active is None else np.flatnonzero(active)
        at = address[lanes] - SHARED_BASE
        good = (at >= 0) & (at + 8 <= shared.size)
        places = at[good] + self.m.program_of[lanes[good]] * shared.size
        shared.owned[shared.shadow(places, 8)] = owned

    def others_first(self, runnable: Array) -> Array:
        """Threads that poll let the others go first."""
        if not self._yielding.any():
            return runnable
        others = runnable & ~self._yielding
        self._yielding[:] = False
        return others if others.any() else runnable

    def poll(self, i: Instruction, address: Array, parity: Array) -> Array:
        """Whether the phase with this parity is complete, for each lane.

        Work takes a while: it is done at the second poll of a warp. Code that asks once and goes on has not waited.
        """
        m, active = self.m, self.m.active(i)
        on = np.ones(m.lanes, bool) if active is None else active
        complete = np.zeros(m.lanes, bool)
        for program in np.unique(m.program_of[on]):
            mine = np.flatnonzero(on & (m.program_of == program))
            place, wanted = int(address[mine[0]]), int(parity[mine[0]]) & 1
            if (address[mine] != place).any() or (parity[mine] & 1 != wanted).any():
                raise UnknownInstructionError(i, "threads of a program wait for several barriers")
            key = int(program), place
            barrier = self.known.get(key)
            if barrier is None:
                m.faults.add("a wait for an mbarrier that was not initialised", i)
                complete[mine] = True
                continue
            warps = set(m.warp_of[mine].tolist())
            asked = self._asked.setdefault(key, set())
            if barrier.phase & 1 == wanted and m.tensor.queue.arrives(*key):
                if warps <= asked:
                    asked.clear()
                    m.tensor.queue.work_until(*key)
                else:
                    asked |= warps
            complete[mine] = barrier.phase & 1 != wanted
        waiting = on & ~complete
        self._yielding |= waiting
        self._polls = self._polls + 1 if waiting.any() else 0
        if self._polls > _PATIENCE:
            raise TimeoutError(f"PTX line {i.line} waits for ever: {i.text}")
        return complete


@instruction(r"mbarrier\.init\.shared(?:::cta)?\.b64")
def initialise(m: Machine, i: Instruction) -> Step:
    address, count = m.address(i.operands[0], "b32"), int(i.operands[1], 0)

    def run() -> None:
        where, active = address(), m.active(i)
        m.shared.store(i, where, active, 8, [np.zeros(m.lanes, np.uint64)])
        m.tensor.barriers.own(where, active, True)
        for program, lane in m.tensor.queue.one_lane(i):
            m.tensor.barriers.known[program, int(where[lane])] = Barrier(0, count, count)

    return run, []


@instruction(r"mbarrier\.inval\.shared(?:::cta)?\.b64")
def invalidate(m: Machine, i: Instruction) -> Step:
    address = m.address(i.operands[0], "b32")

    def run() -> None:
        where = address()
        m.shared.store(i, where, m.active(i), 8, [np.zeros(m.lanes, np.uint64)])
        m.tensor.barriers.own(where, m.active(i), False)
        for program, lane in m.tensor.queue.one_lane(i):
            if m.tensor.barriers.known.pop((program, int(where[lane])), None) is None:
                m.faults.add("an mbarrier is invalidated that was not initialised", i)

    return run, []


@instruction(r"mbarrier\.arrive\.shared(?:::cta)?\.b64")
def arrive(m: Machine, i: Instruction) -> Step:
    address = m.address(i.operands[1], "b32")
    if i.operands[0] != "_" or len(i.operands) > 2:
        raise UnknownInstructionError(i)

    def run() -> None:
        where, active = address(), m.active(i)
        m.shared.load(i, where, active, 8, 1)
        for lane in m.lane if active is None else np.flatnonzero(active):
            barrier = m.tensor.barriers.known.get((int(m.program_of[lane]), int(where[lane])))
            if barrier is None:
                m.faults.add("an arrival at an mbarrier that was not initialised", i)
            else:
                barrier.arrive()

    return run, []


@instruction(r"mbarrier\.(?:try_wait|test_wait)\.parity(?:\.shared(?:::cta)?)?\.b64")
def wait(m: Machine, i: Instruction) -> Step:
    registers, target = m.registers, m.target(i.operands[0])
    address, parity = m.address(i.operands[1], "b32"), m.source(i.operands[2], "b32")

    def run() -> None:
        where = address()
        m.shared.load(i, where, m.active(i), 8, 1)
        registers[target] = m.tensor.barriers.poll(i, where, registers[parity])

    return run, [target]
