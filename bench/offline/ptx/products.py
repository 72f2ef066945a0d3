"""Products of a warp: `mma.sync`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .matrix import BYTES, multiply_add
from .numbers import F32, U32, pairs
from .registry import Step, UnknownInstructionError, instruction

if TYPE_CHECKING:
    from .machine import Machine
    from .program import Instruction


@instruction(r"mma\.sync\.aligned\.m16n8k(?P<k>4|8|16)\.row\.col\.f32\.(?P<kind>bf16|f16|tf32)\.(?P=kind)\.f32")
def multiply(m: Machine, i: Instruction, k: str, kind: str) -> Step:
    """[16, k] · [k, 8] + [16, 8]; in each fragment lane 4 * row + column has a pair of columns."""
    registers, depth, warps = m.registers, int(k), m.warps
    names = [m.listed(operand) for operand in i.operands]
    targets = [m.target(name) for name in names[0]]
    a_of, b_of, c_of = ([m.source(name, "b32") for name in names[place]] for place in (1, 2, 3))
    words = depth * BYTES[kind] // 16  # of a lane, for 8 rows
    if (len(targets), len(a_of), len(b_of), len(c_of)) != (4, 2 * words, words, 4):
        raise UnknownInstructionError(i)

    def run() -> None:
        m.check_whole(i)
        a = pairs(np.stack([registers[place] for place in a_of], 1), kind)  # [lanes, registers, pair]
        b = pairs(np.stack([registers[place] for place in b_of], 1), kind)
        each = a.shape[2]
        a = a.reshape(warps, 8, 4, words, 2, each).transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, depth)
        b = b.reshape(warps, 8, 4, words, each).transpose(0, 3, 2, 4, 1).reshape(warps, depth, 8)
        c = np.stack([registers[place].view(F32) for place in c_of], 1)
        c = c.reshape(warps, 8, 4, 2, 2).transpose(0, 3, 1, 2, 4).reshape(warps, 16, 8)
        found = multiply_add(m, a, b, c, kind)
        found = found.reshape(warps, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(m.lanes, 4)
        for place, target in enumerate(targets):
            registers[target] = np.ascontiguousarray(found[:, place]).view(U32)
        m.counts.flops += 2 * 16 * 8 * depth * (warps if m.mask is None else int(m.mask.reshape(-1, 32).any(1).sum()))

    return run, targets
