"""Asynchronous copies (`cp.async`), whose data arrives at the wait and not before. Fences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .numbers import UNSIGNED, Array
from .registry import Step, UnknownInstructionError, instruction

if TYPE_CHECKING:
    from .machine import Machine
    from .program import Instruction


@dataclass
class _Copy:
    instruction: Instruction
    lanes: Array
    target: Array  # offsets in shared memory
    data: Array  # [lanes, bytes]
    reads: Array  # whether it reads anything, by lane
    group: Array  # number of the commit, by lane


class AsyncCopies:
    """Copies under way; each thread has its own groups."""

    def __init__(self, m: Machine) -> None:
        self.m = m
        self.reset()

    def reset(self) -> None:
        self._open: list[_Copy] = []
        self._committed: list[_Copy] = []
        self._commits = np.zeros(self.m.lanes, np.int32)

    def begin(self, i: Instruction, lanes: Array, target: Array, data: Array, reads: Array) -> None:
        self.m.shared.mark_write(i, lanes, target, data.shape[1], arriving=True)
        self._open.append(_Copy(i, lanes, target, data, reads, np.zeros(len(lanes), np.int32)))

    def commit(self) -> None:
        """The open copies of the threads that are on become a group."""
        m, left = self.m, []
        for copy in self._open:
            mine = np.ones(len(copy.lanes), bool) if m.mask is None else m.mask[copy.lanes]
            for done in _split(copy, mine):
                done.group = self._commits[done.lanes].copy()
                self._committed.append(done)
            left += _split(copy, ~mine)
        self._open = left
        self._commits[slice(None) if m.mask is None else m.mask] += 1

    def wait(self, newest: int) -> None:
        """All groups of the threads that are on, but for the newest few, arrive."""
        m, left = self.m, []
        for copy in self._committed:
            done = copy.group < self._commits[copy.lanes] - newest
            if m.mask is not None:
                done &= m.mask[copy.lanes]
            for arrived in _split(copy, done):
                self._arrive(arrived)
            left += _split(copy, ~done)
        self._committed = left

    def wait_all(self) -> None:
        self.commit()
        self.wait(0)

    def _arrive(self, copy: _Copy) -> None:
        shared, size = self.m.shared, copy.data.shape[1]
        unit = min(size, 8)
        words = np.ascontiguousarray(copy.data).view(UNSIGNED[unit])
        for place in range(words.shape[1]):
            shared.views[unit][copy.target // unit + place] = words[:, place]
        if self.m.options.watch:
            places = shared.shadow(copy.target, size)
            np.subtract.at(shared.arriving, places, 1)
            shared.note_write(places, copy.lanes)

    def finish(self) -> None:
        """At the end of programs: data that was not waited for."""
        for copy in [*self._open, *self._committed]:
            if copy.reads.any():  # copies that are masked off, beyond the last step of a loop, are common and harmless
                self.m.faults.add("cp.async without a wait", copy.instruction, "", int(copy.reads.sum()))


def _split(copy: _Copy, mine: Array) -> list[_Copy]:
    if mine.all():
        return [copy]
    if not mine.any():
        return []
    parts = (part[mine] for part in (copy.lanes, copy.target, copy.data, copy.reads, copy.group))
    return [_Copy(copy.instruction, *parts)]


# --- instructions -----------------------------------------------------------------------------------------------------


@instruction(r"cp\.async\.(?P<cache>ca|cg)\.shared(?:::cta)?\.global(?:\.L2::\w+)?")
def copy(m: Machine, i: Instruction, cache: str) -> Step:
    """`size` bytes; where a fourth operand is less, zeros fill the rest."""
    size = int(i.operands[2], 0)
    to, of = m.address(i.operands[0], "b32"), m.address(i.operands[1], "b64")
    given = m.source(i.operands[3], "b32") if len(i.operands) > 3 else None
    if size not in ((4, 8, 16) if cache == "ca" else (16,)) or len(i.operands) > 4:
        raise UnknownInstructionError(i)

    def run() -> None:
        active = m.active(i)
        lanes, target = m.shared.places(i, to(), active, size)
        count = np.full(m.lanes, size) if given is None else m.registers[given].astype(np.int64)
        if (odd := ((count != 0) & (count != size))[lanes]).any():
            raise UnknownInstructionError(i, f"{count[lanes][odd][0]} bytes of {size}")
        reads = count > 0 if active is None else (count > 0) & active
        data = m.memory.copy(m, i, of(), reads, size)
        m.copies.begin(i, lanes, target, data[lanes], reads[lanes])

    return run, []


@instruction(r"cp\.async\.commit_group")
def commit(m: Machine, i: Instruction) -> Step:
    return m.copies.commit, []


@instruction(r"cp\.async\.wait_group")
def wait(m: Machine, i: Instruction) -> Step:
    newest = int(i.operands[0], 0)
    return (lambda: m.copies.wait(newest)), []


@instruction(r"cp\.async\.wait_all")
def wait_all(m: Machine, i: Instruction) -> Step:
    return m.copies.wait_all, []


@instruction(r"fence\.proxy\.async(?:\.shared::cta)?")
def fence_proxy(m: Machine, i: Instruction) -> Step:
    return m.shared.fence_async_proxy, []


@instruction(r"(?:fence\.proxy\.async\.global|fence\.(?:sc|acq_rel)\.(?:cta|gpu|sys|cluster)|membar\.(?:cta|gl|sys))")
def fence(m: Machine, i: Instruction) -> Step:
    """Orders one thread's accesses; here they are in order."""
    return (lambda: None), []
