"""Tensor memory of sm_100 (`tcgen05`): its columns, and moves between it and registers.

Loads are delivered at `tcgen05.wait::ld`, stores count as moving until `tcgen05.wait::st`. Products and the barriers
that they arrive at are in `tensor_products` and `mbarriers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .numbers import I32, U32, Array
from .program import split_operands
from .registry import Step, UnknownInstructionError, instruction

if TYPE_CHECKING:
    from .machine import Machine
    from .program import Instruction, Program
    from .tensor_products import Queue

ROWS, COLUMNS = 128, 512  # of a program; each place has 32 bits

Place = tuple[Any, Any, Any]  # program, row, column: an index into the arrays


class TensorMemory:
    """Places of all programs, their shadow, and work under way.

    Attributes:
        late: registers (indices) that loads deliver at their wait.
    """

    def __init__(self, m: Machine) -> None:
        self.m = m
        self.late = {m.index[name] for name in _loaded(m.program) if name in m.index}
        self._present = any(one.head in ("tcgen05", "mbarrier") for one in m.program.instructions)
        self.reset()

    def reset(self) -> None:
        from .mbarriers import Barriers
        from .tensor_products import Queue

        m = self.m
        shape = (m.programs if self._present else 0, ROWS, COLUMNS)
        self.data = np.full(shape, 0xFFFFFFFF, U32)
        self.written = np.full(shape, -1, I32)  # epoch of the last write
        self.read = np.full(shape, -1, I32)
        self.busy = np.zeros(shape, np.int16)  # products under way on it
        self.moving = np.zeros(shape, bool)  # stores under way to it
        self.allocated: list[tuple[int, int] | None] = [None] * m.programs  # first column, columns
        self.barriers = Barriers(m)
        self.queue: Queue = Queue(m)
        self._loads: dict[int, Array] = {}  # register -> the value that a load will deliver
        self._stores: list[tuple[Array, Place]] = []

    # --- time ---

    def others_first(self, runnable: Array) -> Array:
        """The lanes that go on: those that poll a barrier let the others go first."""
        return self.barriers.others_first(runnable)

    def check_delivered(self, i: Instruction, register: int) -> None:
        """Called before another instruction touches the target of a load."""
        if register in self._loads:
            if i.head == "mov":
                return  # paired up with another register: ptxas makes no instruction of it
            self.m.faults.add("the target of tcgen05.ld is touched before tcgen05.wait::ld", i)
            self.deliver()

    def move_late(self, i: Instruction, run: Any, targets: list[int]) -> bool:
        """Carry out a move of a register that a load will deliver, to be delivered with it. False for another move."""
        m, registers = self.m, self.m.registers
        names = [name for text in i.operands[1:] for name in m.listed(text)]
        sources = [m.index[name] for name in names if name in m.index and m.index[name] in self._loads]
        if not sources:
            return False
        for source in sources:
            registers[source] = self._loads[source]
        before = [registers[target] for target in targets]
        run()
        for target, old in zip(targets, before, strict=True):
            value = registers[target]
            self._loads[target] = value if m.mask is None or old is None else np.where(m.mask, value, old)
            registers[target] = None
        for source in sources:
            registers[source] = None
        return True

    def begin_load(self, values: dict[int, Array]) -> None:
        for register, value in values.items():
            self._loads[register] = value
            self.m.registers[register] = None

    def deliver(self) -> None:
        """tcgen05.wait::ld"""
        for register, value in self._loads.items():
            self.m.registers[register] = value
        self._loads.clear()

    def begin_store(self, lanes: Array, where: Place) -> None:
        self.moving[where] = True
        self._stores.append((lanes, where))

    def settle(self) -> None:
        """tcgen05.wait::st"""
        left = []
        for lanes, where in self._stores:
            if self.m.mask is None or self.m.mask[lanes].all():
                self.moving[where] = False
            else:
                left.append((lanes, where))
        self._stores = left

    def held(self, of: int) -> Array | None:
        """The value of a register, delivered or not."""
        return self._loads.get(of, self.m.registers[of])

    def finish(self) -> None:
        last = self.m.program.instructions[-1]
        self.queue.finish()
        if count := sum(one is not None for one in self.allocated):
            self.m.faults.add("tensor memory is not given back", last, "", count)

    # --- columns ---

    def within(self, program: int, column: int, count: int) -> bool:
        """Whether these columns are allocated."""
        mine = self.allocated[program]
        return mine is not None and mine[0] <= column and column + count <= sum(mine)

    def bounds(self) -> tuple[Array, Array]:
        """The first column, and the one behind the last, of each lane's program."""
        pairs = [mine or (COLUMNS, -COLUMNS) for mine in self.allocated]
        first = np.array([low for low, _ in pairs])
        return first[self.m.program_of], first[self.m.program_of] + np.array([n for _, n in pairs])[self.m.program_of]


def _loaded(program: Program) -> set[str]:
    """Targets of loads, and of moves of these."""
    names: set[str] = set()
    for one in program.instructions:
        if one.name.startswith("tcgen05.ld"):
            names |= set(split_operands(one.operands[0].strip("{} ")))
    for one in program.instructions if names else ():
        if one.head == "mov" and set(split_operands(one.operands[1].strip("{} "))) & names:
            names |= set(split_operands(one.operands[0].strip("{} ")))
    return names


# --- instructions -----------------------------------------------------------------------------------------------------


@instruction(r"tcgen05\.alloc\.cta_group::1\.sync\.aligned\.shared::cta\.b32")
def allocate(m: Machine, i: Instruction) -> Step:
    """Columns for a program, not the first ones where there is room: code that ignores the address shows."""
    address, count = m.address(i.operands[0], "b32"), int(i.operands[1], 0)
    if count not in (32, 64, 128, 256, 512):
        raise UnknownInstructionError(i, f"{count} columns")

    def run() -> None:
        m.check_whole(i)
        active, first = m.active(i), m.in_warp == 0
        writes = first if active is None else first & active
        for lane in np.flatnonzero(writes):
            program = int(m.program_of[lane])
            if m.tensor.allocated[program] is not None:
                m.faults.add("tensor memory is allocated twice", i)
            m.tensor.allocated[program] = COLUMNS - count, count
        m.shared.store(i, address(), writes, 4, [np.full(m.lanes, COLUMNS - count, U32)])

    return run, []


@instruction(r"tcgen05\.dealloc\.cta_group::1\.sync\.aligned\.b32")
def give_back(m: Machine, i: Instruction) -> Step:
    def run() -> None:
        active = m.active(i)
        for program in np.unique(m.program_of if active is None else m.program_of[active]):
            if m.tensor.allocated[program] is None:
                m.faults.add("tensor memory is given back that is not allocated", i)
            m.tensor.allocated[program] = None

    return run, []


@instruction(r"tcgen05\.(?:relinquish_alloc_permit\.cta_group::1\.sync\.aligned|fence::(?:before|after)_thread_sync)")
def nothing(m: Machine, i: Instruction) -> Step:
    return (lambda: None), []


@instruction(r"tcgen05\.wait::(?P<what>ld|st)\.sync\.aligned")
def wait(m: Machine, i: Instruction, what: str) -> Step:
    return (m.tensor.deliver if what == "ld" else m.tensor.settle), []


def _places(m: Machine, i: Instruction, address: Array, shape: str, count: int, split: int) -> tuple[Array, Place]:
    """The lanes of a load or store that stay within bounds, and their places."""
    active = m.active(i)
    row, column = address >> 16, address & 0xFFFF
    if shape == "32x32b":
        row = row + m.in_warp
    else:  # 16x32bx2: the upper half of the warp takes the same rows, `split` columns further
        row, column = row + m.in_warp % 16, column + split * (m.in_warp // 16)
    low, high = m.tensor.bounds()
    quarter = m.lane % m.threads // 32 % 4
    bad = (row // 32 != quarter) | (column < low) | (column + count > high)
    on = np.ones(m.lanes, bool) if active is None else active
    if (bad & on).any():
        m.faults.add("tensor memory access out of bounds", i, f"row {row[bad & on][0]}, column {column[bad & on][0]}",
                     int((bad & on).sum()))  # fmt: skip
    lanes = np.flatnonzero(on & ~bad)
    return lanes, (m.program_of[lanes][:, None], row[lanes][:, None], column[lanes][:, None] + np.arange(count))


_MOVE = r"\.sync\.aligned\.(?P<shape>32x32b|16x32bx2)\.x(?P<count>\d+)\.b32"


@instruction(rf"tcgen05\.ld{_MOVE}")
def load(m: Machine, i: Instruction, shape: str, count: str) -> Step:
    number = int(count)
    targets = [m.target(name) for name in m.listed(i.operands[0])]
    address = m.address(i.operands[1], "b32")
    split = int(i.operands[2], 0) if shape == "16x32bx2" else 0
    if len(targets) != number:
        raise UnknownInstructionError(i)

    def run() -> None:
        m.check_whole(i)
        tensor, active = m.tensor, m.active(i)
        lanes, where = _places(m, i, address(), shape, number, split)
        if tensor.busy[where].any():
            m.faults.add("tensor memory: read while a product runs on it", i)
        if m.options.watch and (missing := int((tensor.written[where] < 0).sum())) > 0:
            m.faults.add("tensor memory: read of what was never written", i, "", missing)
        if tensor.moving[where].any():
            m.faults.add("tensor memory: read of what was stored without tcgen05.wait::st", i)
        tensor.read[where] = m.shared.epoch[lanes][:, None]
        values = np.zeros((m.lanes, number), U32)
        values[lanes] = tensor.data[where]
        late = {}
        for place, target in enumerate(targets):
            value, old = np.ascontiguousarray(values[:, place]), tensor.held(target)
            late[target] = value if active is None or old is None else np.where(active, value, old)
        tensor.begin_load(late)

    return run, []


@instruction(rf"tcgen05\.st{_MOVE}")
def store(m: Machine, i: Instruction, shape: str, count: str) -> Step:
    registers, number = m.registers, int(count)
    address, split = m.address(i.operands[0], "b32"), int(i.operands[1], 0) if shape == "16x32bx2" else 0
    sources = [m.source(name, "b32") for name in m.listed(i.operands[-1])]
    if len(sources) != number:
        raise UnknownInstructionError(i)

    def run() -> None:
        m.check_whole(i)
        tensor = m.tensor
        for source in set(sources):
            tensor.check_delivered(i, source)
        lanes, where = _places(m, i, address(), shape, number, split)
        if tensor.busy[where].any():
            m.faults.add("tensor memory: write while a product runs on it", i)
        tensor.begin_store(lanes, where)
        tensor.data[where] = np.stack([registers[source] for source in sources], 1)[lanes]
        tensor.written[where] = m.shared.epoch[lanes][:, None]

    return run, []
