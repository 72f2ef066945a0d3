"""Control flow: blocks of instructions, lanes that part and meet, barriers.

Lanes run in lockstep. Where they part, those at the first block go first under a mask, in an order in which all of a
loop comes before what follows it: they meet again where a GPU's compiler lets them meet. The order between barriers
does not matter to the faults: races are told by the accesses between two barriers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import networkx  # which torch needs
import numpy as np

from .machine import POISON, Block, Machine, merged
from .numbers import Array
from .program import Instruction
from .registry import UnknownInstructionError

_NAME = re.compile(r"%?[\w$]+(?:@\d+)?")


def ends_block(one: Instruction) -> bool:
    """Whether an instruction may change which instruction is next, or waits for other threads."""
    return one.head in ("bra", "ret", "exit") or one.is_barrier


def block_order(machine: Machine) -> list[int]:
    """The blocks, each before those that follow it; those of a loop together, its first one first."""
    graph: networkx.DiGraph[int] = networkx.DiGraph()
    end = len(machine.blocks)
    for place, block in enumerate(machine.blocks):
        graph.add_edges_from((place, target) for target in _successors(machine, block, place) if target < end)
        graph.add_node(place)
    return list(_ordered(graph, graph, 0))


def _successors(machine: Machine, block: Block, place: int) -> list[int]:
    one = block.end
    if one is None or one.is_barrier:
        return [place + 1]
    if one.head == "bra":
        target = machine.block_of[machine.program.labels[one.operands[-1]]]
        return [target] if one.predicate is None else [target, place + 1]
    return [] if one.predicate is None else [place + 1]


def _ordered(graph: networkx.DiGraph[int], whole: networkx.DiGraph[int], entry: int) -> Iterator[int]:
    """The blocks of a part of the `whole` graph."""
    loops = networkx.condensation(graph)
    for number in networkx.lexicographical_topological_sort(loops, key=lambda one: min(loops.nodes[one]["members"])):
        members = loops.nodes[number]["members"]
        first = next((one for one in sorted(members) if one == entry or _entered(whole, one, members)), min(members))
        yield first
        if len(members) > 1:
            yield from _ordered(graph.subgraph(members - {first}), whole, -1)


def _entered(graph: networkx.DiGraph[int], block: int, loop: set[int]) -> bool:
    """Whether a block of a loop follows one outside."""
    return any(before not in loop for before in graph.predecessors(block))


def run(machine: Machine, programs: Sequence[int]) -> None:
    """Run these programs (linear numbers) to their end; faults and counts go to the machine's."""
    with np.errstate(all="ignore"):
        machine.reset(programs)
        _Run(machine).run()
        machine.copies.finish()
        machine.products.finish()
        machine.tensor.finish()


class _Run:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.end = len(machine.blocks)
        self.block = np.zeros(machine.lanes, np.int32)  # where each lane goes on
        self.rank = np.argsort([*machine.order, self.end])
        self.waiting = np.zeros(machine.lanes, bool)  # at a barrier
        self.blocks = 0
        self.last = machine.program.instructions[-1]  # barrier that threads wait at

    def run(self) -> None:
        machine = self.machine
        while True:
            runnable = (self.block < self.end) & ~self.waiting
            if not runnable.any():
                if self.waiting.any():
                    count = int(self.waiting.sum())
                    machine.faults.add("a barrier that not all threads of a program reach", self.last, count=count)
                return
            runnable = machine.tensor.others_first(runnable)
            place = machine.order[self.rank[self.block[runnable]].min()]
            active = runnable & (self.block == place)
            everyone = bool(active.all())
            machine.mask = None if everyone else active
            while place < self.end:
                block = machine.blocks[place]
                _carry_out(machine, block)
                self.blocks += 1
                if self.blocks > machine.options.patience:
                    raise TimeoutError(f"{machine.program.name} does not end: {self.blocks} blocks of instructions ran")
                follows = self._follow(block, place, active, everyone)
                if follows is None:
                    break
                place = follows
                if not everyone:
                    self.block[active] = place
                    break
            else:
                self.block[active] = self.end

    def _follow(self, block: Block, place: int, active: Array, everyone: bool) -> int | None:
        """The next block of all active lanes; None where they have been sent to several."""
        machine, one = self.machine, block.end
        if one is None:
            return place + 1
        if one.is_barrier:
            return self._barrier(one, place + 1, active, everyone)
        target = self.end
        if one.head == "bra":
            target = machine.block_of[machine.program.labels[one.operands[-1]]]
        if one.predicate is None:
            return target
        if machine.registers[machine.source(one.predicate[0], "pred")] is None:
            _poison(machine, one)
        taken = machine.predicate(one) & active
        if not taken.any():
            return place + 1
        if (taken == active).all():
            return target
        self.block[active] = place + 1
        self.block[taken] = target
        return None

    def _barrier(self, one: Instruction, following: int, active: Array, everyone: bool) -> int | None:
        machine = self.machine
        if one.operands[:1] not in ([], ["0"]) or len(one.operands) > 1 or one.predicate:
            raise UnknownInstructionError(one, "only barrier 0 of all threads is known")
        machine.check_whole(one)
        if everyone:
            machine.shared.passed_barrier(None)
            return following
        self.waiting |= active
        self.block[active] = following
        self.last = one
        waiting = self.waiting.reshape(machine.programs, -1)
        left = (self.block >= self.end).reshape(machine.programs, -1)
        free: Array = (waiting | left).all(1) & waiting.any(1)  # type: ignore[assignment]
        if (left & free[:, None]).any():
            machine.faults.add("a barrier that not all threads of a program reach", one, "some have left")
        lanes = np.repeat(free, machine.threads)
        machine.shared.passed_barrier(lanes)
        self.waiting[lanes] = False
        return None


def _carry_out(machine: Machine, block: Block) -> None:
    steps, place, count = block.steps, 0, len(block.steps)
    if machine.counts.on:
        machine.counts.entered(block, machine)
    while place < count:
        try:
            if machine.mask is None:
                while place < count:
                    steps[place]()
                    place += 1
            else:
                while place < count:
                    _masked(machine, steps[place], block.targets[place])
                    place += 1
        except (AttributeError, TypeError):  # None is no array: a register that was not written
            if not _poison(machine, block.instructions[place], block.targets[place]):
                raise


def _masked(machine: Machine, step: object, targets: list[int]) -> None:
    registers = machine.registers
    before = [registers[target] for target in targets]
    step()  # type: ignore[operator]
    for target, old in zip(targets, before, strict=True):
        if registers[target] is not None:  # None: asynchronous work will deliver it
            registers[target] = merged(machine.mask, registers[target], old)


def _unwritten(machine: Machine, names: set[str]) -> list[str]:
    return [name for name in sorted(names) if name in machine.index and machine.registers[machine.index[name]] is None]


def _poison(machine: Machine, one: Instruction, targets: Sequence[int] = ()) -> bool:
    """Give the unwritten registers that an instruction reads a value, as a fault; whether there were any."""
    written, *others = one.operands or [""]
    first, names = set(_NAME.findall(written)), set(_NAME.findall(" ".join(others)))
    if one.predicate:
        names.add(one.predicate[0])
    names |= {name for name in first if machine.index.get(name) not in targets}
    missing = _unwritten(machine, names) or _unwritten(machine, first)  # some add to what they write
    for name in missing:
        kind = machine.storage(name)
        value = POISON & (1 << 8 * np.dtype(kind).itemsize) - 1
        machine.registers[machine.index[name]] = np.full(machine.lanes, value).astype(kind)
    if missing and one.head != "prmt":  # of unused bytes, which compilers leave undefined
        machine.faults.add("a register is read before it is written", one, ", ".join(missing))
    return bool(missing)
