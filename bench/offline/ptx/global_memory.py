"""Global memory: tensors at their addresses, checked and watched.

Only the tensors that were added exist. Arrays of the size of a tensor are allocated untouched: a tensor larger than the
machine's memory costs only its part that programs touch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .numbers import I64, U8, UNSIGNED, Array

if TYPE_CHECKING:
    from .machine import Machine
    from .program import Instruction

SECTOR = 32  # bytes
_SEVERAL = 0xFF  # in place of the number of a warp
_MANY = (1 << 23) - 1  # in place of the number of a program
Touch = Callable[[bool, Array, Array, int], None]  # whether written, numbers of programs, addresses, bytes


@dataclass(eq=False)
class Region:
    """One tensor's memory.

    Attributes:
        name: for messages.
        start: address, a multiple of 16.
        data: uint8 [bytes], read and written in place.
        unit: bytes that are watched together; a divisor of the size of every access.
        output: whether it is an output of some launch. Then reads of what was never written are watched, and races.
        writable: whether it is one of the launch at hand.
        readable: whether the launch at hand may reach it.
        cleared: whether it was cleared before the launch, so that programs may add to it unwritten.
        outside: bool [units], true for those that do not belong to the tensor; None where all do.
        writes: how often each unit was written, 255 at most.
        read_sectors, write_sectors: sectors of 32 bytes that the launch at hand touched; only where traffic is counted.
    """

    name: str
    start: int
    data: Array
    unit: int
    output: bool = False
    writable: bool = field(init=False)
    readable: bool = True
    cleared: bool = False
    outside: Array | None = None
    writes: Array = field(init=False)
    read_sectors: Array = field(init=False)
    write_sectors: Array = field(init=False)
    writer: Array = field(init=False)  # in this launch: program + 1, warp, epoch
    reader: Array = field(init=False)  # the same, with _SEVERAL for several warps and _MANY for several programs

    def __post_init__(self) -> None:
        if self.start % 16 or self.data.dtype != U8:
            raise ValueError(
                f"{self.name}: got memory at {self.start:#x} of {self.data.dtype}, allowed is uint8 at a multiple of 16"
            )
        self.writable = self.output
        self.writes = np.zeros(self.units if self.output else 0, U8)
        self.begin_launch()

    @property
    def units(self) -> int:
        return -(-len(self.data) // self.unit)

    @property
    def end(self) -> int:
        return self.start + len(self.data)

    def begin_launch(self) -> None:
        """Forget reads and writes of the last launch; what was written stays written."""
        units = self.units if self.output else 0
        self.writer, self.reader = np.zeros(units, I64), np.zeros(units, I64)
        self.read_sectors = np.zeros(len(self.data) // SECTOR + 1, bool)
        self.write_sectors = np.zeros(len(self.data) // SECTOR + 1, bool)

    def become_output(self) -> None:
        """Watch it as an output, of which nothing counts as written."""
        if not self.output:
            self.output = True
            self.writes = np.zeros(self.units, U8)

    def view(self, size: int) -> Array:
        """The data as unsigned integers of `size` bytes; less than one at the end is left out."""
        return self.data[: len(self.data) // size * size].view(UNSIGNED[size])


class GlobalMemory:
    """The tensors that a launch may reach.

    Attributes:
        touch: is told of accesses while a kernel is traced; see `trace`.
    """

    def __init__(self) -> None:
        self.touch: Touch | None = None
        self.regions: list[Region] = []
        self._starts = np.zeros(0, I64)
        self._views: dict[tuple[int, int], Array] = {}

    def add(self, region: Region) -> Region:
        """Map a tensor.

        Raises:
            ValueError: where it overlaps another.
        """
        for other in self.regions:
            if region.start < other.end and other.start < region.end:
                raise ValueError(f"{region.name}: got memory that overlaps {other.name}, allowed are tensors apart")
        self.regions.append(region)
        self.regions.sort(key=lambda one: one.start)
        self._starts = np.array([one.start for one in self.regions], I64)
        self._views.clear()
        return region

    def begin_launch(self) -> None:
        for region in self.regions:
            region.begin_launch()

    def begin_programs(self, machine: Machine) -> None:
        """Called before programs run."""
        self._program = np.repeat(np.asarray(machine.ids), machine.threads).astype(I64) + 1
        self._warp = (machine.lane % machine.threads // 32).astype(I64)

    # --- access ---

    def load(
        self, m: Machine, i: Instruction, address: Array, active: Array | None, size: int, count: int
    ) -> list[Array]:
        """`count` values of `size` bytes a lane; zeros for lanes that are off."""
        values = [np.zeros(m.lanes, UNSIGNED[size]) for _ in range(count)]
        for region, lanes, at in self._parts(m, i, address, active, size * count, write=False):
            view, first = self._view(region, size), at // size
            for place, value in enumerate(values):
                value[lanes] = view[first + place]
        return values

    def store(
        self, m: Machine, i: Instruction, address: Array, active: Array | None, size: int, values: list[Array]
    ) -> None:
        """Write values of `size` bytes a lane."""
        for region, lanes, at in self._parts(m, i, address, active, size * len(values), write=True):
            view, first = self._view(region, size), at // size
            for place, value in enumerate(values):
                view[first + place] = value[lanes]

    def add_to(
        self, m: Machine, i: Instruction, address: Array, active: Array | None, kind: Any, values: list[Array]
    ) -> list[Array]:
        """Add atomically, lanes in their order; returns what was there before."""
        size = np.dtype(kind).itemsize
        before: list[Array] = [np.zeros(m.lanes, kind) for _ in values]
        for region, lanes, at in self._parts(m, i, address, active, size * len(values), write=True, atomic=True):
            view: Array = self._view(region, size).view(kind)
            first = at // size
            for place, value in enumerate(values):
                where = first + place
                if len(np.unique(where)) < len(where):
                    for lane, element in zip(lanes, where, strict=True):
                        before[place][lane] = view[element]
                        view[element] += value[lane]
                else:
                    before[place][lanes] = view[where]
                    view[where] += value[lanes]
        return before

    def copy(self, m: Machine, i: Instruction, address: Array, active: Array | None, size: int) -> Array:
        """uint8 [lanes, size] for an asynchronous copy; zeros for lanes that are off."""
        found = np.zeros((m.lanes, size), U8)
        for region, lanes, at in self._parts(m, i, address, active, size, write=False):
            found[lanes] = region.data[at[:, None] + np.arange(size)]
        return found

    def _view(self, region: Region, size: int) -> Array:
        key = region.start, size
        if key not in self._views:
            self._views[key] = region.view(size)
        return self._views[key]

    def _parts(
        self, m: Machine, i: Instruction, address: Array, active: Array | None, size: int, *, write: bool,
        atomic: bool = False,
    ) -> list[tuple[Region, Array, Array]]:  # fmt: skip
        """By region: the lanes that may carry the access out, and their offsets. All else is a fault."""
        lanes = m.lane if active is None else np.flatnonzero(active)
        if m.counts.on:
            m.counts.global_access(i, address, lanes, size, m)
        place = np.searchsorted(self._starts, address[lanes], side="right") - 1
        parts = []
        for number in np.unique(place):
            region = self.regions[number] if number >= 0 and self.regions[number].readable else None
            mine = lanes[place == number]
            where = address[mine]
            at = where - (region.start if region else 0)
            bad = at + size > len(region.data) if region else np.ones(len(mine), bool)
            if bad.any():
                first = np.flatnonzero(bad)[0]
                self._fault(m, i, f"global {_kind(write)} out of bounds", mine, bad,
                            f"address {where[first]:#x}, {_relative(region, int(where[first]))}")  # fmt: skip
            odd = at % size != 0
            if odd.any():
                self._fault(m, i, f"global {_kind(write)} not aligned to {size} bytes", mine, odd, "")
            good = ~(bad | odd)
            if region is None or not good.any():
                continue
            if not good.all():
                mine, at = mine[good], at[good]
            if m.counts.on:
                sectors = region.write_sectors if write else region.read_sectors
                sectors[at // SECTOR] = True
            mine, at = self._watched(m, i, region, mine, at, size, write=write, atomic=atomic)
            parts.append((region, mine, at))
        return parts

    @staticmethod
    def _fault(m: Machine, i: Instruction, kind: str, lanes: Array, where: Array, detail: str) -> None:
        lane = int(lanes[np.flatnonzero(where.reshape(len(lanes), -1).any(1))[0]])
        thread = f"thread {lane % m.threads} of program {m.ids[lane // m.threads]}"
        m.faults.add(kind, i, f"{thread}; {detail}" if detail else thread, int(where.sum()))

    def _watched(
        self,
        m: Machine,
        i: Instruction,
        region: Region,
        lanes: Array,
        at: Array,
        size: int,
        *,
        write: bool,
        atomic: bool,
    ) -> tuple[Array, Array]:
        """Look at elements that do not belong to the tensor, unwritten ones and races; the lanes that may go on."""
        if write and not region.writable:
            self._fault(m, i, "global write to what is no output", lanes, np.ones(len(lanes), bool), region.name)
            return lanes[:0], at[:0]
        if region.outside is None and not region.output:
            return lanes, at
        places = at[:, None] // region.unit + np.arange(-(-size // region.unit))
        if region.outside is not None:
            beyond = region.outside[places]
            if beyond.any():
                self._fault(m, i, f"global {_kind(write)} outside the tensor's elements", lanes, beyond, region.name)
                if write:
                    good = ~beyond.any(1)
                    lanes, at, places = lanes[good], at[good], places[good]
        if region.output and m.options.watch:
            if (not write or atomic) and not region.cleared:
                missing = region.writes[places] == 0
                if missing.any():
                    self._fault(m, i, "global read of what was never written", lanes, missing, region.name)
            self._watch_races(m, i, region, lanes, places, write=write, atomic=atomic)
        if region.output and write:
            if atomic:
                np.add.at(region.writes, places, 1)
            else:
                counts = region.writes[places]
                region.writes[places] = np.where(counts < 255, counts + 1, counts)
        return lanes, at

    def _watch_races(
        self, m: Machine, i: Instruction, region: Region, lanes: Array, places: Array, *, write: bool, atomic: bool
    ) -> None:
        program, warp = self._program[lanes][:, None], self._warp[lanes][:, None]
        epoch = m.shared.epoch[lanes][:, None].astype(I64)
        mine = program << 32 | warp << 24 | epoch
        writer = region.writer[places]
        what = _kind(write)
        if atomic:
            if (writer != 0).any():
                self._fault(
                    m, i, "global race: atomic on what was stored in this launch", lanes, writer != 0, region.name
                )
            return
        other = (writer != 0) & (writer >> 32 != program)
        if other.any():
            self._fault(m, i, f"global race: {what} of what another program wrote", lanes, other, region.name)
        near = (writer >> 32 == program) & (writer & 0xFFFFFF == epoch) & (writer != mine)
        if near.any():
            self._fault(
                m, i, f"global race: {what} of what another warp wrote, no barrier between", lanes, near, region.name
            )
        seen = region.reader[places]
        if not write:
            self._note_reads(region, places, mine, program, epoch)
            return
        bad = (seen != 0) & (seen >> 32 != program)
        if bad.any():
            self._fault(m, i, "global race: write of what another program read", lanes, bad, region.name)
        near = (seen >> 32 == program) & (seen & 0xFFFFFF == epoch) & (seen != mine)
        if near.any():
            what = "global race: write of what another warp read, no barrier between"
            self._fault(m, i, what, lanes, near, region.name)
        region.writer[places] = mine | (lanes[:, None] % 32 + 1) << 56  # the lane, to see two in one instruction
        twice = region.writer[places] >> 56 != lanes[:, None] % 32 + 1
        twice |= region.writer[places] & (1 << 56) - 1 != mine
        if twice.any():
            self._fault(
                m, i, "global race: one place written by two threads of one instruction", lanes, twice, region.name
            )
        region.writer[places] = mine

    @staticmethod
    def _note_reads(region: Region, places: Array, mine: Array, program: Array, epoch: Array) -> None:
        seen, mine = region.reader[places], np.broadcast_to(mine, places.shape)
        region.reader[places] = mine
        last = region.reader[places]  # another thread of the instruction may have come last
        warps = (seen >> 32 == program) & (seen & 0xFFFFFF == epoch) & (seen != mine)
        warps |= (last >> 32 == program) & (last != mine)
        region.reader[places[warps]] = mine[warps] | _SEVERAL << 24
        programs = ((seen != 0) & (seen >> 32 != program)) | (last >> 32 != program)
        region.reader[places[programs]] = _MANY << 32


def _kind(write: bool) -> str:
    return "write" if write else "read"


def _relative(region: Region | None, address: int) -> str:
    if region is None:
        return "in no tensor of the launch"
    return f"{address - region.start} bytes into {region.name}, which has {len(region.data)}"
