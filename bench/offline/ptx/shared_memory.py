"""Shared memory of all programs, and a shadow that tells races, late data and missing fences.

The shadow has a place for each few bytes: the smallest access of the kernel. An epoch is the time between two barriers
of a program; a clock orders the writes, `bar.warp.sync` and fences within one.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from .numbers import I32, I64, U8, U16, UNSIGNED, Array, width

if TYPE_CHECKING:
    from .machine import Machine
    from .program import Instruction

SHARED_BASE = 1024  # the first KiB belongs to the system
CHUNK = 16  # bytes, the unit of the matrix units
_SEVERAL = -2  # in place of a warp


class SharedMemory:
    """Bytes of all programs, one after the other."""

    def __init__(self, m: Machine) -> None:
        self.m = m
        self.size = -(-m.launch.shared_memory // CHUNK) * CHUNK  # of a program
        self.granule = min([CHUNK, *filter(None, map(_width, m.program.instructions))])
        self.reset()

    def reset(self) -> None:
        m, total = self.m, max(self.m.programs * self.size, CHUNK)
        places = total // self.granule
        self.data = np.full(total, 0xFF, U8)
        self.views = {size: self.data.view(kind) for size, kind in UNSIGNED.items()}
        self.chunks = self.data.view(U16).reshape(-1, CHUNK // 2)
        self.epoch = np.zeros(m.lanes, I32)
        self.clock = 1
        self.written = np.full(places, -1, I32)  # epoch of the last write
        self.writer = np.full(places, -1, I32)  # its lane
        self.write_time = np.zeros(places, I64)
        self.read = np.full(places, -1, I32)  # epoch of the last read
        self.reader = np.full(places, -1, I32)  # its warp
        self.read_lane = np.full(places, -1, I32)
        self.read_time = np.zeros(places, I64)
        self.arriving = np.zeros(places, np.int16)  # asynchronous copies under way to it
        self.owned = np.zeros(places, bool)  # by an mbarrier
        self.multiplied = np.zeros(places, np.int16)  # products under way that read it
        self.warp_sync = np.zeros(m.warps, I64)
        self.fenced = np.zeros(m.warps, I64)  # when each warp last had fence.proxy.async
        self.fence_epoch = np.zeros(m.warps, I32)

    # --- time ---

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def passed_barrier(self, lanes: Array | None) -> None:
        """All threads of some programs (None: of all) have met."""
        if lanes is None:
            self.epoch += 1
            self.warp_sync[:] = self.tick()
        else:
            self.epoch[lanes] += 1
            self.warp_sync[lanes.reshape(-1, 32).any(1)] = self.tick()

    def synchronise_warps(self) -> None:
        self.warp_sync[self.m.on_warps()] = self.tick()

    def fence_async_proxy(self) -> None:
        on = self.m.on_warps()
        self.fenced[on], self.fence_epoch[on] = self.tick(), self.epoch[::32][on]

    # --- access ---

    def places(self, i: Instruction, address: Array, active: Array | None, size: int) -> tuple[Array, Array]:
        """The lanes whose access is within bounds and aligned, and its offset in the memory of all programs."""
        m = self.m
        lanes = m.lane if active is None else np.flatnonzero(active)
        at = address[lanes] - SHARED_BASE
        bad = (at < 0) | (at + size > self.size)
        if bad.any():
            m.faults.add("shared access out of bounds", i, f"offset {at[bad][0]} of {self.size}", int(bad.sum()))
        odd = at % size != 0
        if odd.any():
            m.faults.add(f"shared access not aligned to {size} bytes", i, f"offset {at[odd][0]}", int(odd.sum()))
        if m.counts.on:
            m.counts.shared_access(i, address, lanes, size, m)
        if bad.any() or odd.any():
            lanes, at = lanes[~(bad | odd)], at[~(bad | odd)]
        return lanes, at + m.program_of[lanes] * self.size

    def load(self, i: Instruction, address: Array, active: Array | None, size: int, count: int) -> list[Array]:
        """`count` values of `size` bytes a lane; zeros for lanes that are off."""
        lanes, at = self.places(i, address, active, size * count)
        self.mark_read(i, lanes, at, size * count)
        view, first = self.views[size], at // size
        if len(lanes) == self.m.lanes:
            return [view[first + place] for place in range(count)]
        values = [np.zeros(self.m.lanes, UNSIGNED[size]) for _ in range(count)]
        for place, value in enumerate(values):
            value[lanes] = view[first + place]
        return values

    def store(self, i: Instruction, address: Array, active: Array | None, size: int, values: list[Array]) -> None:
        lanes, at = self.places(i, address, active, size * len(values))
        several = self.mark_write(i, lanes, at, size * len(values))
        view, first = self.views[size], at // size
        for place, value in enumerate(values):
            view[first + place] = value[lanes]
        if several:
            differ = sum(int((view[first + place] != value[lanes]).sum()) for place, value in enumerate(values))
            if differ:
                self.m.faults.add(
                    "shared race: one place written with several values by one instruction", i, "", differ
                )

    # --- the shadow ---

    def shadow(self, at: Array, size: int) -> Array:
        """[n, places] of accesses of `size` bytes at the offsets [n]."""
        return at[:, None] // self.granule + np.arange(max(size // self.granule, 1))

    def mark_read(self, i: Instruction, lanes: Array, at: Array, size: int) -> None:
        if not self.m.options.watch or not len(lanes):
            return
        add, places = self.m.faults.add, self.shadow(at, size)
        epoch, warp = self.epoch[lanes][:, None], self.m.warp_of[lanes][:, None]
        written, writer = self.written[places], self.writer[places]
        if (missing := int((written < 0).sum())) > 0:
            add("shared read of what was never written", i, "", missing)
        if self.arriving[places].any():
            add("shared read of the target of cp.async before its wait", i)
        fresh = written == epoch
        if fresh.any():
            other = fresh & (writer // 32 != warp)
            if other.any():
                add("shared race: read of what another warp wrote, no barrier between", i, "", int(other.sum()))
            close = fresh & ~other & (writer != lanes[:, None]) & (self.write_time[places] > self.warp_sync[warp])
            if close.any():
                add("shared race: read of what another thread of the warp wrote, no bar.warp.sync between", i, "",
                    int(close.sum()))  # fmt: skip
        self.note_read(places, epoch, lanes)

    def note_read(self, places: Array, epoch: Array, lanes: Array | None) -> None:
        """Remember the readers: lanes, or several warps (None)."""
        if lanes is None:
            self.read[places], self.reader[places] = epoch, _SEVERAL
            return
        warp, lane = self.m.warp_of[lanes][:, None], lanes[:, None]
        now = self.read[places] == epoch
        others = now & (self.reader[places] != warp)
        close = now & (self.read_lane[places] != lane) & (self.read_time[places] > self.warp_sync[warp])
        self.read[places], self.reader[places], self.read_lane[places] = epoch, warp, lane
        self.read_time[places] = self.tick()
        others |= self.reader[places] != warp
        close |= self.read_lane[places] != lane
        if others.any():
            self.reader[places[others]] = _SEVERAL
        if close.any():
            self.read_lane[places[close]] = _SEVERAL

    def mark_write(self, i: Instruction, lanes: Array, at: Array, size: int, *, arriving: bool = False) -> bool:
        """Watch a write; whether two threads write to one place. `arriving`: it takes effect later."""
        if not self.m.options.watch or not len(lanes):
            return False
        add, places = self.m.faults.add, self.shadow(at, size)
        epoch, warp = self.epoch[lanes][:, None], self.m.warp_of[lanes][:, None]
        for done, other, lane, time, what in (
            (self.read, self.reader, self.read_lane, self.read_time, "read"),
            (self.written, self.writer // 32, self.writer, self.write_time, "wrote"),
        ):
            fresh, far = done[places] == epoch, other[places] != warp
            if (race := int((fresh & far).sum())) > 0:
                add(f"shared race: write of what another warp {what}, no barrier between", i, "", race)
            close = fresh & ~far & (lane[places] != lanes[:, None]) & (time[places] > self.warp_sync[warp])
            if close.any():
                add(f"shared race: write of what another thread of the warp {what}, no bar.warp.sync between", i, "",
                    int(close.sum()))  # fmt: skip
        if i.head != "mbarrier" and self.owned[places].any():
            add("shared write to an mbarrier", i)
        if self.arriving[places].any():
            add("shared write to the target of cp.async before its wait", i)
        if self.multiplied[places].any():
            add("shared write to the operand of a product under way", i)
        if arriving:
            np.add.at(self.arriving, places, 1)
            if (self.arriving[places] > 1).any():
                add("shared race: two cp.async to one place", i)
            return False
        self.note_write(places, lanes)
        return bool((self.writer[places] != lanes[:, None]).any())

    def note_write(self, places: Array, lanes: Array) -> None:
        self.written[places], self.writer[places] = self.epoch[lanes][:, None], lanes[:, None]
        self.write_time[places] = self.tick()

    # --- operands of matrix units, which read through another proxy ---

    def begin_product(self, i: Instruction, places: Array, epoch: Array, warps: Array) -> None:
        """A product by `warps` begins to read places [n]; epoch and warps broadcast against them."""
        add, written, time = self.m.faults.add, self.written[places], self.write_time[places]
        if (missing := int((written < 0).sum())) > 0:
            add("a matrix operand in shared memory was never written", i, "", missing)
        if self.arriving[places].any():
            add("a matrix operand is the target of cp.async before its wait", i)
        if (race := int((written == epoch).sum())) > 0:
            add("shared race: a product reads what was written, no barrier between", i, "", race)
        # A fence by the writer before the barrier, or by the reader behind it.
        unfenced = time > self.fenced[np.maximum(self.writer[places], 0) // 32]
        unfenced &= written >= self.fence_epoch[warps].min(0)
        if unfenced.any():
            add("a product reads what was written without fence.proxy.async", i, "", int(unfenced.sum()))
        np.add.at(self.multiplied, places, 1)

    def end_product(self, places: Array) -> None:
        np.subtract.at(self.multiplied, places, 1)

    def of_chunks(self, chunks: Array) -> Array:
        """Places [n, ...] of 16-byte chunks."""
        each = CHUNK // self.granule
        return chunks.reshape(-1, 1) * each + np.arange(each)


def _width(i: Instruction) -> int | None:
    """Bytes of an instruction's access to shared memory; None without one."""
    parts = i.name.split(".")
    if i.head in ("ld", "st", "atom", "red") and any(part.startswith("shared") for part in parts):
        count = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)), 1)
        return count * width(parts[-1])
    if i.name.startswith(("cp.async.ca", "cp.async.cg")):
        return int(i.operands[2], 0)
    if i.head == "mbarrier":
        return 8
    return 4 if i.name.startswith("tcgen05.alloc") else None
