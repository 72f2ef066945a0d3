"""Which global memory programs touch, without their arithmetic.

Only the instructions of a kernel that addresses and control flow depend on are carried out. This is cheap enough for
whole grids, and tells which programs another one takes its input from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .accesses import access_size
from .execute import execute
from .global_memory import GlobalMemory, Region, Touch
from .machine import Launch, Machine
from .numbers import UNSIGNED, Array
from .program import Instruction, Program
from .registry import Step, instruction

if TYPE_CHECKING:
    from collections.abc import Iterable

_NAME = re.compile(r"%?[\w$]+(?:@\d+)?")
# What may stand between a thread's number and an address.
_KEPT = {
    "add", "sub", "mul", "mad", "div", "rem", "min", "max", "neg", "abs", "and", "or", "xor", "not", "shl", "shr",
    "shf", "bfe", "bfi", "prmt", "lop3", "popc", "clz", "selp", "setp", "mov", "cvt", "cvta", "shfl", "vote", "elect",
    "bra", "ret", "exit", "fma", "ex2", "rcp",
}  # fmt: skip


class NotTraceableError(Exception):
    """Raised for kernels whose addresses depend on more than arguments and global memory."""


def elements_read(program: Program, launch: Launch, memory: GlobalMemory, programs: Sequence[int]) -> dict[int, Array]:
    """The units that programs read: start of a region -> bool [units].

    Raises:
        NotTraceableError: where addresses depend on shared memory.
    """
    found = {region.start: np.zeros(region.units, bool) for region in memory.regions}

    def touch(written: bool, ids: Array, addresses: Array, size: int) -> None:
        if not written:
            for region, places, _ in _by_region(memory, addresses, size):
                found[region.start][places] = True

    _trace(program, launch, memory, programs, touch)
    return found


def programs_writing(program: Program, launch: Launch, memory: GlobalMemory, wanted: dict[int, Array]) -> list[int]:
    """The programs of a launch that write any of the units (as `elements_read` gives them).

    Raises:
        NotTraceableError: where addresses depend on shared memory.
    """
    chosen = np.zeros(int(np.prod(launch.grid)), bool)

    def touch(written: bool, ids: Array, addresses: Array, size: int) -> None:
        if written:
            for region, places, lanes in _by_region(memory, addresses, size):
                if region.start in wanted:
                    chosen[ids[lanes][wanted[region.start][places].any(1)]] = True

    _trace(program, launch, memory, range(len(chosen)), touch)
    return [int(number) for number in np.flatnonzero(chosen)]


def write_counts(program: Program, launch: Launch, memory: GlobalMemory) -> dict[int, Array]:
    """How often all programs of a launch write each unit: start of a region -> uint8 [units].

    Raises:
        NotTraceableError: where addresses depend on shared memory.
    """
    found = {one.start: np.zeros(-(-one.units // 8) * 8, np.uint8) for one in memory.regions if one.output}

    def touch(written: bool, ids: Array, addresses: Array, size: int) -> None:
        for region, places, _ in _by_region(memory, addresses, size) if written else ():
            if region.output:  # the units of an access are aligned, and counted together
                kind = UNSIGNED[places.shape[1]]
                one = kind(0x0101010101010101 & (1 << 8 * places.shape[1]) - 1)
                np.add.at(found[region.start].view(kind), places[:, 0] // places.shape[1], one)

    _trace(program, launch, memory, range(int(np.prod(launch.grid))), touch)
    return {region.start: found[region.start][: region.units] for region in memory.regions if region.output}


def _by_region(memory: GlobalMemory, addresses: Array, size: int) -> Iterable[tuple[Region, Array, Array]]:
    """(region, units [n, k], which of the addresses)."""
    for region in memory.regions:
        lanes = np.flatnonzero((addresses >= region.start) & (addresses + size <= region.end))
        if len(lanes):
            first = (addresses[lanes] - region.start)[:, None] // region.unit
            yield region, first + np.arange(-(-size // region.unit)), lanes


def _trace(program: Program, launch: Launch, memory: GlobalMemory, programs: Sequence[int], touch: Touch) -> None:
    memory.touch = touch
    try:
        execute(sliced(program), launch, memory, programs=programs)
    finally:
        memory.touch = None


def sliced(program: Program) -> Program:
    """The part of a kernel that addresses of global memory and control flow depend on; accesses become traces.

    Raises:
        NotTraceableError: where that part reads shared memory or results of matrix units.
    """
    code = [one for one in program.instructions if not _polls(one, program)]
    needed = {name for one in code for name in _roots(one)}
    writers: dict[str, list[Instruction]] = {}
    for one in code:
        for name in _targets(one):
            writers.setdefault(name, []).append(one)
    kept: set[Instruction] = set()
    todo = list(needed)
    while todo:
        for one in writers.get(todo.pop(), []):
            if one in kept:
                continue
            if one.head not in _KEPT and not one.name.startswith(("ld.param", "ld.global")):
                raise NotTraceableError(f"PTX line {one.line}: {one.text}")
            kept.add(one)
            todo += [name for name in _sources(one) if name not in needed]
            needed |= set(_sources(one))
    places, instructions = {}, list[Instruction]()
    for place, one in enumerate(program.instructions):
        places[place] = len(instructions)
        traced = _traced(one)
        if traced is not None:
            instructions.append(traced)
        if one in kept or (one.head in ("bra", "ret", "exit") and one in code):
            instructions.append(one)
    places[len(program.instructions)] = len(instructions)
    labels = {name: places[place] for name, place in program.labels.items()}
    return replace(program, instructions=instructions, labels=labels)


def _polls(one: Instruction, program: Program) -> bool:
    """Whether a branch goes back to ask a barrier again."""
    if one.head != "bra" or one.predicate is None:
        return False
    return any(
        other.name.startswith("mbarrier") and other.operands[0] == one.predicate[0] for other in program.instructions
    )


def _global(one: Instruction) -> bool:
    return one.head in ("ld", "st", "atom", "red", "cp") and ".global" in one.name and len(one.operands) > 0


def _address(one: Instruction) -> str:
    """The operand that addresses global memory."""
    return one.operands[{"st": 0, "red": 0, "ld": 1, "atom": 1, "cp": 1}[one.head]]


def _traced(one: Instruction) -> Instruction | None:
    if not _global(one):
        return None
    if one.head == "cp":
        size, given = int(one.operands[2], 0), one.operands[3:]
        return replace(one, name=f"trace.read.{size}", operands=[_address(one), *given])
    kind = "read" if one.head == "ld" else "write"
    return replace(one, name=f"trace.{kind}.{access_size(one)}", operands=[_address(one)])


def _roots(one: Instruction) -> set[str]:
    traced = _traced(one)
    if traced is not None:
        names = set(_NAME.findall(" ".join(traced.operands)))
    elif one.head in ("bra", "ret", "exit"):
        names = set()
    else:
        return set()
    return names | ({one.predicate[0]} if one.predicate else set())


def _targets(one: Instruction) -> set[str]:
    """The registers that an instruction writes: none where its first operand is an address."""
    if not one.operands or one.operands[0].startswith("["):
        return set()
    return {name for name in _NAME.findall(one.operands[0]) if name[0] not in "0123456789$"}


def _sources(one: Instruction) -> set[str]:
    names = set(_NAME.findall(" ".join(one.operands[1:])))
    return names | ({one.predicate[0]} if one.predicate else set()) | (_targets(one) if one.predicate else set())


@instruction(r"trace\.(?P<kind>read|write)\.(?P<size>\d+)")
def trace(m: Machine, i: Instruction, kind: str, size: str) -> Step:
    """Report the addresses of the lanes that are on; a second operand of 0 switches a copy off."""
    address, touch = m.address(i.operands[0], "b64"), m.memory.touch
    assert touch is not None
    given = m.source(i.operands[1], "b32") if len(i.operands) > 1 else None

    def run() -> None:
        active = m.active(i)
        on = np.ones(m.lanes, bool) if active is None else active
        if given is not None:
            on = on & (m.registers[given] != 0)
        lanes = np.flatnonzero(on)
        if len(lanes):
            touch(kind == "write", m.ids[m.program_of[lanes]], address()[lanes], int(size))

    return run, []
