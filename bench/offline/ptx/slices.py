"""The part of a kernel that its accesses to global memory depend on: their addresses, and whether they happen."""

from __future__ import annotations

import re
from dataclasses import replace

import networkx  # which torch needs

from .accesses import access_size
from .program import Instruction, Program

_NAME = re.compile(r"%?[\w$]+(?:@\d+)?")
# Instructions that an address may pass through on its way from a thread's number.
_KEPT = {
    "add", "sub", "mul", "mad", "div", "rem", "min", "max", "neg", "abs", "and", "or", "xor", "not", "shl", "shr",
    "shf", "bfe", "bfi", "prmt", "lop3", "popc", "clz", "selp", "setp", "mov", "cvt", "cvta", "shfl", "vote", "elect",
    "fma", "ex2", "rcp",
}  # fmt: skip
_ENDS = ("bra", "ret", "exit")


class NotTraceableError(Exception):
    """Raised for kernels whose accesses depend on more than arguments and global memory."""


def sliced(program: Program) -> Program:
    """Keep the part of a kernel that its accesses to global memory depend on; the accesses become traces.

    A branch that no access depends on goes where its ways meet.

    Raises:
        NotTraceableError: where that part reads shared memory or results of matrix units.
    """
    code, flow = program.instructions, _Flow(program)
    writers: dict[str, list[int]] = {}
    for place, one in enumerate(code):
        for name in _targets(one):
            writers.setdefault(name, []).append(place)
    todo = [place for place, one in enumerate(code) if _global(one)]
    accesses, kept = set(todo), set[int]()  # a load is kept, too, where its value matters
    while todo:
        place = todo.pop()
        one = code[place]
        names = _sources(one) if place in kept else _roots(one)
        depends = {writer for name in names for writer in writers.get(name, ())} | flow.controls(place)
        for other in depends - kept:
            head, name = code[other].head, code[other].name
            if head not in _KEPT and head not in _ENDS and not name.startswith(("ld.param", "ld.global")):
                raise NotTraceableError(f"PTX line {code[other].line}: {code[other].text}")
            kept.add(other)
            todo.append(other)
    places, instructions, labels = [0], list[Instruction](), dict[str, int]()
    for place, one in enumerate(code):
        if place in accesses:
            instructions.append(_traced(one))
        if place in kept or (one.head in _ENDS and one.predicate is None):
            instructions.append(one)
        elif one.head in _ENDS:
            meeting, name = flow.meeting(place), f"$meeting{place}"
            labels[name] = meeting
            instructions.append(replace(one, name="bra", operands=[name], predicate=None))
        places.append(len(instructions))
    labels |= program.labels
    return replace(program, instructions=instructions, labels={name: places[place] for name, place in labels.items()})


class _Flow:
    """The flow of control: blocks of instructions, by their first one's place, and the end."""

    def __init__(self, program: Program) -> None:
        code = program.instructions
        self.end = len(code)
        ends = [place for place, one in enumerate(code) if one.head in _ENDS]
        self.starts = sorted({0, *program.labels.values(), *(place + 1 for place in ends)} - {self.end})
        self.block_of = [0] * len(code)
        graph: networkx.DiGraph[int] = networkx.DiGraph()
        self.branches: dict[int, int] = {}  # block -> place of the conditional branch at its end
        for start, stop in zip(self.starts, [*self.starts[1:], self.end], strict=True):
            self.block_of[start:stop] = [start] * (stop - start)
            last = code[stop - 1]
            if last.head not in _ENDS or last.predicate is not None:
                graph.add_edge(start, stop)
            if last.head in _ENDS:
                graph.add_edge(start, program.labels[last.operands[-1]] if last.head == "bra" else self.end)
                if last.predicate is not None:
                    self.branches[start] = stop - 1
        # The first block that all ways from a block lead through.
        self.after = dict(networkx.immediate_dominators(graph.reverse(copy=False), self.end))
        self._controls: dict[int, set[int]] = {start: set() for start in self.starts}
        for block, place in self.branches.items():
            for way in graph.successors(block):
                while way not in (self.after.get(block), self.end):
                    self._controls[way].add(place)
                    way = self.after.get(way, self.end)

    def controls(self, place: int) -> set[int]:
        """The conditional branches that decide whether, and how often, an instruction is reached."""
        return self._controls[self.block_of[place]]

    def meeting(self, branch: int) -> int:
        """Where the ways from a conditional branch meet."""
        return self.after[self.block_of[branch]]


def _global(one: Instruction) -> bool:
    return one.head in ("ld", "st", "atom", "red", "cp") and ".global" in one.name and len(one.operands) > 0


def _address(one: Instruction) -> str:
    """The operand that addresses global memory."""
    return one.operands[{"st": 0, "red": 0, "ld": 1, "atom": 1, "cp": 1}[one.head]]


def _traced(one: Instruction) -> Instruction:
    if one.head == "cp":
        size, given = int(one.operands[2], 0), one.operands[3:]
        return replace(one, name=f"trace.read.{size}", operands=[_address(one), *given])
    kind = "read" if one.head == "ld" else "write"
    return replace(one, name=f"trace.{kind}.{access_size(one)}", operands=[_address(one)])


def _roots(one: Instruction) -> set[str]:
    """The registers that an access to global memory depends on, apart from values that it writes."""
    return set(_NAME.findall(" ".join(_traced(one).operands))) | ({one.predicate[0]} if one.predicate else set())


def _targets(one: Instruction) -> set[str]:
    """The registers that an instruction writes: none where its first operand is an address."""
    if not one.operands or one.operands[0].startswith("["):
        return set()
    return {name for name in _NAME.findall(one.operands[0]) if name[0] not in "0123456789$"}


def _sources(one: Instruction) -> set[str]:
    names = set(_NAME.findall(" ".join(one.operands[1:])))
    return names | ({one.predicate[0]} if one.predicate else set()) | (_targets(one) if one.predicate else set())
