"""Instructions of a warp: shuffles, votes, the election of a lane, barriers of a warp."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .numbers import U32
from .registry import Step, UnknownInstructionError, instruction

if TYPE_CHECKING:
    from .machine import Machine
    from .program import Instruction

_ALL = ("-1", "0xffffffff", "0xFFFFFFFF", "4294967295")  # members of a whole warp


def _check_members(i: Instruction, members: str) -> None:
    if members not in _ALL:
        raise UnknownInstructionError(i, f"only whole warps are known, not the members {members}")


@instruction(r"shfl\.sync\.(?P<mode>bfly|idx|up|down)\.b32")
def shuffle(m: Machine, i: Instruction, mode: str) -> Step:
    """The value of another lane; of the own one where that is beyond the segment."""
    registers, names = m.registers, i.operands[0].split("|")
    targets = [m.target(name.strip()) for name in names]
    of, by, clamp = (m.source(text, "b32") for text in i.operands[1:4])
    _check_members(i, i.operands[4])
    here = m.in_warp

    def run() -> None:
        m.check_whole(i)
        step, bounds = registers[by].astype(np.int64) & 31, registers[clamp].astype(np.int64)
        segment, last = bounds >> 8 & 31, bounds & 31
        most = (here & segment) | (last & ~segment)
        least = here & segment
        wanted = {
            "bfly": here ^ step,
            "idx": least | (step & ~segment),
            "up": here - step,
            "down": here + step,
        }[mode]
        valid = wanted >= most if mode == "up" else wanted <= most
        registers[targets[0]] = registers[of][m.lane - here + np.where(valid, wanted, here)]
        if len(targets) > 1:
            registers[targets[1]] = valid

    return run, targets


@instruction(r"vote\.sync\.(?P<mode>all|any|uni|ballot)\.(?P<kind>pred|b32)")
def vote(m: Machine, i: Instruction, mode: str, kind: str) -> Step:
    registers, target, of = m.registers, m.target(i.operands[0]), m.source(i.operands[1], "pred")
    _check_members(i, i.operands[2])
    if (mode == "ballot") != (kind == "b32"):
        raise UnknownInstructionError(i)

    def run() -> None:
        m.check_whole(i)
        on = registers[of].reshape(-1, 32)
        if mode == "ballot":
            found = (on.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(U32)
        else:
            found = {"all": on.all(1), "any": on.any(1), "uni": on.all(1) | ~on.any(1)}[mode]
        registers[target] = np.repeat(found, 32)

    return run, [target]


@instruction(r"redux\.sync\.(?P<op>add|min|max|and|or|xor)\.(?P<kind>[sub]32)")
def reduce(m: Machine, i: Instruction, op: str, kind: str) -> Step:
    registers, target, of = m.registers, m.target(i.operands[0]), m.source(i.operands[1], kind)
    _check_members(i, i.operands[2])
    function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                "xor": np.bitwise_xor}[op]  # fmt: skip
    own = np.int32 if kind == "s32" else U32

    def run() -> None:
        m.check_whole(i)
        found = function.reduce(registers[of].view(own).reshape(-1, 32), axis=1).astype(own)
        registers[target] = np.repeat(found, 32).view(U32)

    return run, [target]


@instruction(r"elect\.sync")
def elect(m: Machine, i: Instruction) -> Step:
    """Lane 0 of each warp, as on hardware where the whole warp takes part."""
    names = [name.strip() for name in i.operands[0].split("|")]
    registers, (lane, chosen) = m.registers, [m.target(name) for name in names]
    _check_members(i, i.operands[1])

    def run() -> None:
        m.check_whole(i)
        registers[lane], registers[chosen] = np.zeros(m.lanes, U32), m.in_warp == 0

    return run, [lane, chosen]


@instruction(r"bar\.warp\.sync")
def synchronise(m: Machine, i: Instruction) -> Step:
    _check_members(i, i.operands[0])

    def run() -> None:
        m.check_whole(i)
        m.shared.synchronise_warps()

    return run, []


@instruction(r"nanosleep\.u32|griddepcontrol\.(?:wait|launch_dependents)")
def nothing(m: Machine, i: Instruction) -> Step:
    return (lambda: None), []
