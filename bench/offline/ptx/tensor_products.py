"""Products in tensor memory: `tcgen05.mma`, carried out when a barrier that they arrive at is waited for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .matrix import BYTES, multiply_add, operand_chunks, operand_values
from .numbers import F32, U32, Array, pairs
from .registry import Step, UnknownInstructionError, instruction
from .shared_memory import CHUNK

if TYPE_CHECKING:
    from .machine import Machine
    from .program import Instruction
    from .tensor_memory import Place

_SPANS = {0: 16, 2: 128, 4: 64, 6: 32}  # bits 61 to 63 of a descriptor -> bytes of a swizzled row
_FORMATS = {("f16", 0): "f16", ("f16", 1): "bf16", ("tf32", 2): "tf32"}  # kind of the instruction, bits 7 to 9


@dataclass(eq=False)
class _Operand:
    """A matrix in shared memory (`chunks`) or in tensor memory (`place`)."""

    chunks: Array | None = None
    depth_first: bool = True
    place: Place | None = None


@dataclass(eq=False)
class _Product:
    instruction: Instruction
    a: _Operand
    b: _Operand
    result: Place
    shape: tuple[int, int, int]
    kind: str
    accumulate: bool
    lane: int


@dataclass(eq=False)
class _Arrival:
    instruction: Instruction
    barrier: int


class Queue:
    """Products and arrivals of each program, in order."""

    def __init__(self, m: Machine) -> None:
        self.m = m
        self._work: list[list[_Product | _Arrival]] = [[] for _ in range(m.programs)]

    def one_lane(self, i: Instruction) -> list[tuple[int, int]]:
        """(program, lane) that carries out an instruction for one thread of a program."""
        m, active = self.m, self.m.active(i)
        lanes = m.lane if active is None else np.flatnonzero(active)
        programs = m.program_of[lanes]
        if len(np.unique(programs)) != len(lanes):
            m.faults.add(f"{i.head} by several threads of a program", i, "", len(lanes))
        return [(int(program), int(lane)) for program, lane in zip(programs, lanes, strict=True)]

    def arrives(self, program: int, barrier: int) -> bool:
        """Whether committed work will arrive at a barrier."""
        return any(isinstance(one, _Arrival) and one.barrier == barrier for one in self._work[program])

    def commit(self, i: Instruction, program: int, lane: int, barrier: int) -> None:
        if any(isinstance(one, _Product) and one.lane != lane for one in self._work[program]):
            self.m.faults.add("tcgen05.commit by another thread than its product", i)
        if (program, barrier) not in self.m.tensor.barriers.known:
            self.m.faults.add("tcgen05.commit to an mbarrier that was not initialised", i)
            return
        self._work[program].append(_Arrival(i, barrier))

    def work_until(self, program: int, barrier: int) -> None:
        """Carry work out until a phase of the barrier is complete."""
        work, barriers = self._work[program], self.m.tensor.barriers.known
        before = barriers[program, barrier].phase
        while work and barriers[program, barrier].phase == before:
            one = work.pop(0)
            if isinstance(one, _Product):
                self._multiply(program, one)
            elif (program, one.barrier) in barriers:
                barriers[program, one.barrier].arrive()
            else:
                self.m.faults.add("tcgen05.commit arrives at an mbarrier that was given up", one.instruction)

    def finish(self) -> None:
        for work in self._work:
            for one in work:
                if isinstance(one, _Product):
                    self.m.faults.add("tcgen05.mma without a wait", one.instruction)

    def begin(self, program: int, lane: int, product: _Product) -> None:
        """Check a product and put it into the queue."""
        m, tensor, i = self.m, self.m.tensor, product.instruction
        operands = [one.chunks for one in (product.a, product.b) if one.chunks is not None]
        m.counts.operand_bytes += sum(CHUNK * chunks.size for chunks in operands)
        if m.options.watch:
            epoch, here = m.shared.epoch[lane], product.result
            warps = np.full((1, 1, 1), m.warp_of[lane])
            for operand in (product.a, product.b):
                if operand.chunks is not None:
                    m.shared.begin_product(i, m.shared.of_chunks(operand.chunks), np.array([[epoch]]), warps)
                elif operand.place is not None:
                    self._check_read(i, operand.place, epoch)
                    tensor.busy[operand.place] += 1
            same = any(isinstance(one, _Product) and _same(one.result, here) for one in self._work[program])
            if (tensor.read[here] == epoch).any():
                m.faults.add("tensor memory: a product writes what was read, no barrier between", i)
            if product.accumulate and not same:
                self._check_read(i, here, epoch)
            elif tensor.moving[here].any():
                m.faults.add("tensor memory: a product writes what was stored without tcgen05.wait::st", i)
            tensor.busy[here] += 1
        self._work[program].append(product)
        m.counts.flops += 2 * int(np.prod(product.shape))

    def _check_read(self, i: Instruction, place: Place, epoch: int) -> None:
        tensor, add = self.m.tensor, self.m.faults.add
        if tensor.moving[place].any():
            add("tensor memory: a product reads what was stored without tcgen05.wait::st", i)
        if (tensor.written[place] < 0).any():
            add("tensor memory: a product reads what was never written", i)
        if ((tensor.written[place] == epoch) & (tensor.busy[place] == 0)).any():
            add("tensor memory: a product reads what was stored, no barrier between", i)

    def _multiply(self, program: int, product: _Product) -> None:
        m, tensor = self.m, self.m.tensor
        rows, columns, _ = product.shape
        a, b = (self._values(operand, product.kind) for operand in (product.a, product.b))
        here = product.result
        c = tensor.data[here].view(F32) if product.accumulate else np.zeros((rows, columns), F32)
        tensor.data[here] = multiply_add(m, a, b.T, c, product.kind).view(U32)
        # By another agent: no barrier of the program orders it, the wait does.
        tensor.written[here] = np.maximum(np.where(tensor.written[here] == m.shared.epoch[program * m.threads],
                                                   tensor.written[here] - 1, tensor.written[here]), 0)  # fmt: skip
        if m.options.watch:
            tensor.busy[here] -= 1
            for operand in (product.a, product.b):
                if operand.chunks is not None:
                    m.shared.end_product(m.shared.of_chunks(operand.chunks))
                elif operand.place is not None:
                    tensor.busy[operand.place] -= 1

    def _values(self, operand: _Operand, kind: str) -> Array:
        """float32 [rows, depth]."""
        if operand.chunks is not None:
            return operand_values(self.m, operand.chunks, kind, depth_first=operand.depth_first)[0]
        words = self.m.tensor.data[operand.place]
        return pairs(words, kind).reshape(len(words), -1)


def _same(one: Place, other: Place) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def _rows(count: int, first: int) -> Array:
    """Rows of tensor memory that hold those of a product: 64 take 16 of each 32."""
    return np.arange(128) if count == 128 else np.arange(64) // 16 * 32 + np.arange(64) % 16 + first


@instruction(r"tcgen05\.commit\.cta_group::1\.mbarrier::arrive::one(?P<space>\.shared::cluster)?\.b64")
def commit(m: Machine, i: Instruction, space: str | None) -> Step:
    """Without a state space the address has 64 bits: Triton 3.6 writes that of shared memory, extended by zeros."""
    address = m.address(i.operands[0], "b32" if space else "b64")

    def run() -> None:
        where = address()
        for program, lane in m.tensor.queue.one_lane(i):
            m.tensor.queue.commit(i, program, lane, int(where[lane]))

    return run, []


@instruction(r"tcgen05\.mma\.cta_group::1\.kind::(?P<kind>f16|tf32)")
def multiply(m: Machine, i: Instruction, kind: str) -> Step:
    """[M, K] · [N, K]^T + [M, N]; the fourth operand describes the shapes and types."""
    registers = m.registers
    in_tensor = i.operands[1].startswith("[")
    result = m.address(i.operands[0], "b32")
    a_place = m.address(i.operands[1], "b32") if in_tensor else None
    a_word = None if in_tensor else m.source(i.operands[1], "b64")
    b_word, form_of, keep = (m.source(i.operands[n], k) for n, k in ((2, "b64"), (3, "b32"), (4, "pred")))

    def run() -> None:
        for program, lane in m.tensor.queue.one_lane(i):
            form = int(registers[form_of][lane])
            rows, columns = (form >> 24 & 31) << 4, (form >> 17 & 63) << 3
            name = _FORMATS.get((kind, form >> 7 & 7))
            # float32 sums, both operands of one type, nothing negated, no sparsity
            if name is None or form >> 4 & 3 != 1 or form >> 10 & 7 != form >> 7 & 7 or form >> 13 & 3 or form & 15:
                raise UnknownInstructionError(i, f"instruction descriptor {form:#x}")
            if rows not in (64, 128) or columns not in range(rows // 8, 257, rows // 8):
                raise UnknownInstructionError(i, f"{rows} rows, {columns} columns")
            depth = 32 // BYTES[name]

            def shared(register: int, count: int, along_rows: int, lane: int = lane, program: int = program,
                       name: str = name, depth: int = depth) -> _Operand:  # fmt: skip
                word = registers[register][lane : lane + 1]
                swizzle = int(word[0]) >> 61
                if swizzle not in _SPANS or int(word[0]) >> 46 & 7 != 1:
                    raise UnknownInstructionError(i, f"matrix descriptor {int(word[0]):#x}")
                chunks = operand_chunks(m, i, word, _SPANS[swizzle], np.array([program]), count, depth, name,
                                        depth_first=not along_rows)  # fmt: skip
                return _Operand(chunks, not along_rows)

            where = int(result()[lane])
            place = _place(program, where, rows, columns)
            first_rows = (0,) if rows == 128 else (0, 16)
            inside = m.tensor.within(program, where & 0xFFFF, columns) and where >> 16 in first_rows
            if a_place is not None:
                of = int(a_place()[lane])
                a = _Operand(place=_place(program, of, rows, 8))
                inside &= m.tensor.within(program, of & 0xFFFF, 8) and of >> 16 in first_rows
            else:
                assert a_word is not None
                a = shared(a_word, rows, form >> 15 & 1)
            if not inside:
                m.faults.add("tensor memory: a product out of bounds", i, f"row {where >> 16}, column {where & 0xFFFF}")
                continue
            b, added = shared(b_word, columns, form >> 16 & 1), bool(registers[keep][lane])
            product = _Product(i, a, b, place, (rows, columns, depth), name, added, lane)
            m.tensor.queue.begin(program, lane, product)

    return run, []


def _place(program: int, address: int, rows: int, columns: int) -> Place:
    return program, _rows(rows, address >> 16)[:, None], np.arange(columns)[None, :] + (address & 0xFFFF)
