"""A log of the accesses of kernels, kept beside the machine and apart from its shadows.

`AccessLog` shows the effect of a planted fault: which statements run, the places that each reads, the bits that each
leaves in memory, and accesses that no barrier or wait orders. It goes by whole lists of accesses.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

from .ordering import GLOBAL, SHARED, TENSOR, Run, unordered
from .ptx import tensor_memory
from .ptx.accesses import access_size
from .ptx.async_copies import AsyncCopies
from .ptx.machine import Machine
from .ptx.numbers import Array
from .ptx.program import Instruction, Program
from .ptx.shared_memory import SHARED_BASE, SharedMemory
from .ptx.tensor_products import Queue
from .ptx.warpgroups import WarpgroupProducts

_REGISTER = re.compile(r"%?[\w$]+")
UNIT = 2  # bytes, of a place


@dataclass
class AccessLog:
    """The statements that kernels carry out, and their accesses.

    Attributes:
        wanted: the machines to look at.
        digests: whether to keep `reads` and `writes`.
        accesses: whether to keep all accesses, for `conflicts`.
        ran: (`form` of a kernel, line) -> whether a lane carried it out, whether one left it out.
        reads, writes: for each line a digest of all places that it read, or of those that it wrote with their values.
        unfenced: lines of products whose registers others took since the last `wgmma.fence`.
        runs: the accesses.
    """

    wanted: Callable[[Machine], bool] = lambda machine: True
    digests: bool = True
    accesses: bool = False
    ran: dict[tuple[Any, ...], tuple[bool, bool]] = field(default_factory=dict)
    reads: dict[int, Any] = field(default_factory=dict)
    writes: dict[int, Any] = field(default_factory=dict)
    unfenced: set[int] = field(default_factory=set)
    runs: list[Run] = field(default_factory=list)
    _taken: set[str] | None = None  # registers since the last wgmma.fence; None before the first

    def left(self) -> dict[int, str]:
        """For each line a digest of the places and values that it wrote."""
        return {line: digest.hexdigest() for line, digest in self.writes.items()}

    def taken(self) -> dict[int, str]:
        """For each line a digest of the places that it read."""
        return {line: digest.hexdigest() for line, digest in self.reads.items()}

    def count(self) -> int:
        """Units touched, by each thread that did."""
        return sum(len(rows) for run in self.runs for rows in run.rows)

    def conflicts(self) -> list[str]:
        """Pairs of accesses to one place, one of them a write, that are not ordered."""
        found = [text for run in self.runs for text in unordered(run)]
        return list(dict.fromkeys(found))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Within it, machines report here."""
        hooks: list[tuple[Any, str, Callable[..., Any]]] = [
            (Machine, "_step", self._step), (Machine, "reset", self._reset),
            (SharedMemory, "passed_barrier", self._barrier), (SharedMemory, "synchronise_warps", self._warp_barrier),
            (AsyncCopies, "begin", self._copy), (AsyncCopies, "_arrive", self._arrived),
            (AsyncCopies, "finish", self._unfinished),
            (WarpgroupProducts, "begin", self._multiplies), (WarpgroupProducts, "_end", self._multiplied),
            (Queue, "begin", self._queued), (Queue, "_multiply", self._done),
            (tensor_memory, "_places", self._in_tensor),
        ]  # fmt: skip
        with contextlib.ExitStack() as stack:
            for owner, name, hook in hooks:
                if self.accesses or name in ("_step", "reset"):
                    original = getattr(owner, name)
                    stack.enter_context(mock.patch.object(owner, name, _hooked(hook, original)))
            yield

    # --- statements ---

    def _step(self, original: Callable[..., Any], m: Machine, one: Instruction, fused: Any) -> Any:
        run, targets = original(m, one, fused)
        if not self.wanted(m):
            return run, targets
        space, operand = _operand(one)
        address = m.address(operand, "b64" if space == GLOBAL else "b32") if operand else None
        size = 0 if address is None else _size(one)

        names, own = set(_REGISTER.findall(" ".join(one.operands))), (form(m.program), one.line)

        def noted() -> None:
            self._fence(one, names)
            active, (was_on, was_off) = m.active(one), self.ran.get(own, (False, False))
            on = np.ones(m.lanes, bool) if active is None else active
            if one.head == "cp" and len(one.operands) > 3:
                on = on & (m.registers[m.source(one.operands[3], "b32")] != 0)
            self.ran[own] = was_on or bool(on.any()), was_off or not (on if m.mask is None else on | ~m.mask).all()
            if address is None or not (self.digests or self.accesses):
                run()
                return
            if one.head in ("ldmatrix", "stmatrix"):
                on = on & (m.in_warp < 8 * len(m.listed(one.operands[1 if one.head == "stmatrix" else 0])))
            if one.head == "tcgen05":
                on = on & (m.in_warp == 0)
            lanes = np.flatnonzero(on)
            at = address()[lanes]
            run()
            if len(lanes):
                self._access(m, one, space, lanes, at, size)

        return noted, targets

    def _access(self, m: Machine, one: Instruction, space: int, lanes: Array, at: Array, size: int) -> None:
        write = _writes(one)
        if space == SHARED:
            at = at - SHARED_BASE
            inside = (at >= 0) & (at + size <= m.shared.size)
            lanes, at = lanes[inside], (at + m.program_of[lanes] * m.shared.size)[inside]
        if self.accesses:
            self.runs[-1].time += 1
            places = _units(at, size)
            key = places if space == SHARED else places * m.programs + m.program_of[lanes][:, None]
            self.runs[-1].add(space, key, lanes, write)
        if self.digests:
            digest = (self.writes if write else self.reads).setdefault(one.line, hashlib.blake2b())
            first = np.unique(at)
            for name, start, memory in _memories(m, space):
                mine = first[(first >= start) & (first + size <= start + len(memory))] - start
                values = memory[mine[:, None] + np.arange(size)].tobytes() if write else b""
                digest.update(name + mine.tobytes() + values)

    def _fence(self, one: Instruction, names: set[str]) -> None:
        if one.name.startswith("wgmma.fence"):
            self._taken = set()
        elif one.name.startswith("wgmma.mma"):
            used = set(_REGISTER.findall(one.operands[0]))
            used |= set(_REGISTER.findall(one.operands[1])) if one.operands[1].startswith("{") else set()
            if self._taken is None or used & self._taken:
                self.unfenced.add(one.line)
        elif self._taken is not None:
            self._taken |= names

    # --- time, copies, products ---

    def _reset(self, original: Callable[..., None], m: Machine, programs: Any) -> None:
        original(m, programs)
        if self.wanted(m):
            self._taken = None
            self.runs.append(Run(np.zeros(m.lanes, np.int64), np.zeros(m.warps, np.int64), np.zeros(m.lanes, np.int64)))

    def _barrier(self, original: Callable[..., None], shared: SharedMemory, lanes: Array | None) -> None:
        original(shared, lanes)
        if self.wanted(shared.m):
            run, on = self.runs[-1], slice(None) if lanes is None else lanes
            run.barriers[on] += 1
            run.since[on] = run.time + 1

    def _warp_barrier(self, original: Callable[..., None], shared: SharedMemory) -> None:
        original(shared)
        if self.wanted(shared.m):
            self.runs[-1].warp_barriers[shared.m.on_warps()] += 1

    def _copy(self, original: Callable[..., None], copies: AsyncCopies, i: Instruction, lanes: Array, target: Array,
              data: Array, reads: Array) -> None:  # fmt: skip
        original(copies, i, lanes, target, data, reads)
        if self.wanted(copies.m):
            self.runs[-1].add(SHARED, _units(target, data.shape[1]), lanes, True)
            self.runs[-1].begin(_keys(lanes, target), lanes)

    def _arrived(self, original: Callable[..., None], copies: AsyncCopies, copy: Any) -> None:
        original(copies, copy)
        if self.wanted(copies.m):
            units = _units(copy.target, copy.data.shape[1])
            self.runs[-1].time += 1
            self.runs[-1].end_waited(_keys(copy.lanes, copy.target), copy.lanes, units, True)

    def _unfinished(self, original: Callable[..., None], copies: AsyncCopies) -> None:
        for copy in [*copies._open, *copies._committed]:
            self._arrived(lambda *_: None, copies, copy)  # without a wait it is under way to the end
        original(copies)

    def _multiplies(self, original: Callable[..., None], products: WarpgroupProducts, *rest: Any) -> None:
        original(products, *rest)
        if self.wanted(products.m):
            keys, lanes, units = _of_group(products._running[-1], products.m.shared.granule)
            self.runs[-1].add(SHARED, units, lanes, False)
            self.runs[-1].begin(keys, lanes)

    def _multiplied(self, original: Callable[..., None], products: WarpgroupProducts, ended: Any) -> None:
        if self.wanted(products.m):
            self.runs[-1].time += 1
            for product in ended:
                self.runs[-1].end_waited(*_of_group(product, products.m.shared.granule), False)
        original(products, ended)

    def _queued(self, original: Callable[..., None], queue: Queue, program: int, lane: int, product: Any) -> None:
        original(queue, program, lane, product)
        if self.wanted(queue.m):
            self.runs[-1].begin([id(product)], np.array([lane]))

    def _done(self, original: Callable[..., None], queue: Queue, program: int, product: Any) -> None:
        if self.wanted(queue.m):
            self.runs[-1].time += 1
            self.runs[-1].end_product(id(product), product.lane, _parts(product))
        original(queue, program, product)

    def _in_tensor(self, original: Callable[..., Any], m: Machine, i: Instruction, *rest: Any) -> Any:
        lanes, (program, row, column) = original(m, i, *rest)
        if self.wanted(m):
            self.runs[-1].time += 1
            self.runs[-1].add(TENSOR, (program * 128 + row) * 512 + column, lanes, i.name.startswith("tcgen05.st"))
        return lanes, (program, row, column)


def form(program: Program) -> tuple[Any, ...]:
    """Equal for a kernel and an edited one, but for no two kernels of a call."""
    return program.name, len(program.registers), len(program.parameters)


def _hooked(hook: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    def hooked(*arguments: Any) -> Any:
        return hook(original, *arguments)

    return hooked


def _operand(one: Instruction) -> tuple[int, str]:
    """The space and address of a statement's access; no address for none. Of a copy it is the source."""
    if one.name.startswith(("cp.async.ca.", "cp.async.cg.")):
        return GLOBAL, one.operands[1]
    if one.head == "mbarrier" or one.name.startswith("tcgen05.alloc"):
        return SHARED, next(text for text in one.operands if text.startswith("["))
    parts = one.name.replace("::", ".").split(".")
    if one.head not in ("ld", "st", "ldmatrix", "stmatrix", "red", "atom") or not {"shared", "global"} & set(parts):
        return SHARED, ""
    return (SHARED if "shared" in parts else GLOBAL), next(text for text in one.operands if text.startswith("["))


def _writes(one: Instruction) -> bool:
    return one.head in ("st", "stmatrix", "red", "atom", "tcgen05") or one.name.startswith(("mbarrier.in",))


def _size(one: Instruction) -> int:
    if one.head == "cp":
        return int(one.operands[2], 0)
    known = {"ldmatrix": 16, "stmatrix": 16, "mbarrier": 8, "tcgen05": 4}
    return known[one.head] if one.head in known else access_size(one)


def _memories(m: Machine, space: int) -> list[tuple[bytes, int, Array]]:
    """The name, first address and bytes of each piece of memory; tensors by name and size."""
    if space == SHARED:
        return [(b"", 0, m.shared.data)]
    found = [(f"{region.name} {len(region.data)}".encode(), region.start, region.data) for region in m.memory.regions]
    return sorted(found, key=lambda one: one[0])


def _keys(lanes: Array, target: Array) -> list[int]:
    found: list[int] = (lanes << 32 | target).tolist()
    return found


def _units(at: Array, size: int) -> Array:
    """Numbers [n, units] of the units of accesses of `size` bytes at [n]."""
    found: Array = at[:, None] // UNIT + np.arange(-(-size // UNIT))
    return found


def _of_group(product: Any, granule: int) -> tuple[list[Any], Array, Array]:
    """Keys, lanes and units of a product of warpgroups: each of their warps reads all of the operands."""
    units = _units(product.places.ravel() * granule, granule).reshape(len(product.groups), -1)
    lanes = np.concatenate([product.groups * 128 + 32 * warp for warp in range(4)])
    return [(id(product), lane) for lane in lanes.tolist()], lanes, np.tile(units, (4, 1))


def _parts(product: Any) -> list[tuple[int, Array, bool]]:
    parts = [(TENSOR, _of_tensor(product.result), True)]
    for operand in (product.a, product.b):
        if operand.chunks is not None:
            parts.append((SHARED, _units(operand.chunks.ravel() * 16, 16).reshape(1, -1), False))
        else:
            parts.append((TENSOR, _of_tensor(operand.place), False))
    return parts


def _of_tensor(place: Any) -> Array:
    program, row, column = place
    return ((program * 128 + row) * 512 + column).reshape(1, -1)
