"""Products of a warpgroup: `wgmma`. Results are delivered at the wait and not before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .matrix import BYTES, multiply_add, operand_chunks, operand_values
from .numbers import F32, U32, U64, Array, pairs
from .program import split_operands
from .registry import Step, UnknownInstructionError, instruction

if TYPE_CHECKING:
    from .machine import Machine
    from .program import Instruction, Program

_SPANS = {0: 16, 1: 128, 2: 64, 3: 32}  # bits 62 and 63 of a descriptor -> bytes of a swizzled row
GROUP = 128  # lanes


@dataclass(eq=False)
class _Product:
    instruction: Instruction
    groups: Array  # numbers of the warpgroups
    places: Array  # of shared memory that it reads
    sources: list[tuple[int, Array]]  # registers that it reads, with what they held
    commit: int | None = None


class WarpgroupProducts:
    """Products under way.

    Attributes:
        late: registers (indices) that are accumulators.
    """

    def __init__(self, m: Machine) -> None:
        self.m = m
        self.late = {m.index[name] for name in _accumulators(m.program) if name in m.index}
        self.reset()

    def reset(self) -> None:
        self._running: list[_Product] = []
        self._pending: dict[int, tuple[_Product, Array]] = {}  # accumulator -> its product, its value
        self._commits = 0
        self._fenced: list[Any] | None = None  # registers at the last fence
        self._fresh = False  # whether no group was committed since
        self._touched: set[int] = set()  # accumulators that other instructions took since
        self._delivered: dict[int, Array] = {}

    def check_programs(self, i: Instruction) -> None:
        """Refuse fences, commits and waits by some warpgroups of a program alone: groups are counted together."""
        if self.m.mask is not None:
            of_program = self.m.mask.reshape(self.m.programs, -1)
            if (of_program.any(1) != of_program.all(1)).any():
                raise UnknownInstructionError(i, "by a part of a program")

    def fence(self) -> None:
        self._fenced, self._fresh = list(self.m.registers), True
        self._touched.clear()

    def commit(self) -> None:
        for product in self._running:
            if product.commit is None:
                product.commit = self._commits
        self._commits += 1
        self._fresh = False

    def wait(self, newest: int) -> None:
        self._end([one for one in self._running if one.commit is not None and one.commit < self._commits - newest])

    def check_delivered(self, i: Instruction, register: int) -> None:
        """Called before another instruction touches an accumulator."""
        if register in self._pending:
            self.m.faults.add("an accumulator is touched while its product runs", i)
            self._end(list(self._running))
        self._touched.add(register)

    def finish(self) -> None:
        for product in self._running:
            self.m.faults.add("wgmma without a wait", product.instruction)

    def accumulator(self, i: Instruction, register: int) -> Array | None:
        """The value that a product adds to; None for a register that was not written yet."""
        if register in self._pending:
            return self._pending[register][1]
        value: Array | None = self.m.registers[register]
        if value is None and self._fenced is None:
            self.m.faults.add("wgmma without wgmma.fence before the first", i)
        elif value is not None and self._delivered.get(register) is not value:
            self._check_fenced(i, register, value, "its accumulator")
        elif value is not None and register in self._touched and not self._fresh:
            self.m.faults.add("wgmma without wgmma.fence after its accumulator was read", i)
        return value

    def _check_fenced(self, i: Instruction, register: int, value: Array, what: str) -> None:
        """ptxas orders moves between a fence and the first product behind it."""
        if self._fenced is None or (self._fenced[register] is not value and not self._fresh):
            self.m.faults.add(f"wgmma without wgmma.fence after {what} was written", i)

    def begin(self, i: Instruction, chunks: list[Array], sources: list[int], results: dict[int, Array]) -> None:
        """A product starts: it reads these chunks [G, ...] and registers."""
        m = self.m
        for register in sources:
            self._check_fenced(i, register, m.registers[register], "a register of A")
        on = np.arange(m.lanes // GROUP)
        if m.mask is not None:
            on = on[m.mask.reshape(-1, GROUP).any(1)]
        places = np.zeros((0, 0), np.int64)
        if m.options.watch:
            flat = np.concatenate([part.reshape(len(part), -1) for part in chunks], 1)[on]
            places = m.shared.of_chunks(flat).reshape(len(on), -1)
            warps = (on[:, None] * 4 + np.arange(4)).T[:, :, None]  # [4, groups, 1]
            m.shared.begin_product(i, places, m.shared.epoch[on * GROUP][:, None], warps)
        product = _Product(i, on, places, [(register, m.registers[register]) for register in sources])
        self._running.append(product)
        for register, value in results.items():
            self._pending[register] = product, value
            m.registers[register] = None

    def _end(self, ended: list[_Product]) -> None:
        m = self.m
        for product in ended:
            for register, value in product.sources:
                if m.registers[register] is not value:
                    m.faults.add("a register of A is written while its wgmma reads it", product.instruction)
            if m.options.watch:
                m.shared.end_product(product.places)
                m.shared.note_read(product.places, m.shared.epoch[product.groups * GROUP][:, None], None)
        self._running = [one for one in self._running if one not in ended]
        for register, (product, value) in list(self._pending.items()):
            if product in ended:
                del self._pending[register]
                m.registers[register] = self._delivered[register] = value


def _accumulators(program: Program) -> set[str]:
    names: set[str] = set()
    for one in program.instructions:
        if one.name.startswith("wgmma.mma_async"):
            names |= set(split_operands(one.operands[0].strip("{} ")))
    return names


def _whole(m: Machine, i: Instruction, run: Callable[[], None]) -> Callable[[], None]:
    def checked() -> None:
        m.products.check_programs(i)
        run()

    return checked


@instruction(r"wgmma\.fence\.sync\.aligned")
def fence(m: Machine, i: Instruction) -> Step:
    return _whole(m, i, m.products.fence), []


@instruction(r"wgmma\.commit_group\.sync\.aligned")
def commit(m: Machine, i: Instruction) -> Step:
    return _whole(m, i, m.products.commit), []


@instruction(r"wgmma\.wait_group\.sync\.aligned")
def wait(m: Machine, i: Instruction) -> Step:
    newest = int(i.operands[0], 0)
    return _whole(m, i, lambda: m.products.wait(newest)), []


@instruction(r"wgmma\.mma_async\.sync\.aligned\.m64n(?P<n>\d+)k(?P<k>8|16)\.f32\.(?P<kind>bf16|f16|tf32)\.(?P=kind)")
def multiply(m: Machine, i: Instruction, n: str, k: str, kind: str) -> Step:
    """[64, k] · [k, n] + [64, n], A from registers or shared memory."""
    registers, columns, depth = m.registers, int(n), int(k)
    targets = [m.target(name) for name in m.listed(i.operands[0])]
    from_registers = i.operands[1].startswith("{")
    a_of = [m.source(name, "b32") for name in m.listed(i.operands[1])] if from_registers else []
    a_descriptor = None if from_registers else m.source(i.operands[1], "b64")
    b_descriptor, scale = m.source(i.operands[2], "b64"), m.source(i.operands[3], "pred")
    numbers = [int(text, 0) for text in i.operands[4:]]
    if len(targets) != columns // 2 or numbers[:2] != [1, 1] or depth * BYTES[kind] != 32:
        raise UnknownInstructionError(i)
    # Then come, for 16-bit types, whether A (if in shared memory) and B lie along the rows.
    along_rows = [*([0] if from_registers else []), *numbers[2:], 0, 0]
    groups = m.lanes // GROUP
    programs = np.arange(groups) * GROUP // m.threads

    def operand(register: int, rows: int, depth_first: bool) -> tuple[Array, Array]:
        words = registers[register].reshape(groups, GROUP)
        differ = (words != words[:, :1]).any(1)[m.on_warps(GROUP)]
        modes = (words[:, 0] >> U64(62))[m.on_warps(GROUP)]
        if differ.any():
            m.faults.add("the descriptors of a warpgroup differ", i)
        if (modes != modes[0]).any():
            raise UnknownInstructionError(i, "descriptors of several swizzles")
        found = operand_chunks(
            m, i, words[:, 0], _SPANS[int(modes[0])], programs, rows, depth, kind, depth_first=depth_first
        )
        return found, operand_values(m, found, kind, depth_first=depth_first)

    def run() -> None:
        m.check_whole(i, GROUP)
        chunks = []
        if from_registers:
            a = pairs(np.stack([registers[place] for place in a_of], 1), kind)
            a = a.reshape(groups, 4, 8, 4, 2, 2, a.shape[2]).transpose(0, 1, 5, 2, 4, 3, 6).reshape(groups, 64, depth)
        else:
            assert a_descriptor is not None
            found, a = operand(a_descriptor, 64, not along_rows[0])
            chunks.append(found)
        found, b = operand(b_descriptor, columns, not along_rows[1])
        chunks.append(found)
        keep = registers[scale]
        held = [m.products.accumulator(i, target) for target in targets]
        if keep.any() and any(value is None for value in held):
            m.faults.add("a register is read before it is written", i)
        values = [np.zeros(m.lanes, U32) if value is None else np.where(keep, value, U32(0)) for value in held]
        c = np.stack([value.view(F32) for value in values], 1)
        c = c.reshape(groups, 4, 8, 4, columns // 8, 2, 2).transpose(0, 1, 5, 2, 4, 3, 6).reshape(groups, 64, columns)
        result = multiply_add(m, a, b.swapaxes(1, 2), c, kind)
        result = result.reshape(groups, 4, 2, 8, columns // 8, 4, 2).transpose(0, 1, 3, 5, 4, 2, 6)
        new = np.ascontiguousarray(result.reshape(m.lanes, columns // 2).T).view(U32)
        results = {}
        for place, target in enumerate(targets):
            old = held[place]
            results[target] = new[place] if m.mask is None or old is None else np.where(m.mask, new[place], old)
        m.products.begin(i, chunks, a_of, results)
        active = groups if m.mask is None else int(m.mask.reshape(-1, GROUP).any(1).sum())
        m.counts.flops += 2 * 64 * columns * depth * active
        m.counts.operand_bytes += sum(16 * part[0].size for part in chunks) * active

    return run, []
