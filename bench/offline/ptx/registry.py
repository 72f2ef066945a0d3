"""The instructions that the machine knows: patterns of their names, and the functions that prepare them."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from .program import Instruction

# A function that carries an instruction out for all lanes, and the registers (indices) that it writes.
Step: TypeAlias = tuple[Callable[[], None], list[int]]

_MODULES = (
    "arithmetic", "bits", "moves", "accesses", "async_copies", "warps", "products", "warpgroups", "tensor_memory",
    "tensor_products", "mbarriers", "trace",
)  # fmt: skip
_known: list[tuple[re.Pattern[str], Callable[..., Step]]] = []


class UnknownInstructionError(NotImplementedError):
    """An instruction, or a form of one, that the machine does not know."""

    def __init__(self, instruction: Instruction, reason: str = "") -> None:
        super().__init__(f"PTX line {instruction.line}: {instruction.text}{reason and f': {reason}'}")


def instruction(pattern: str) -> Callable[[Callable[..., Step]], Callable[..., Step]]:
    """Register a function (machine, instruction, **named groups) for all instructions that `pattern` fully matches."""

    def register(prepare: Callable[..., Step]) -> Callable[..., Step]:
        _known.append((re.compile(pattern), prepare))
        return prepare

    return register


@functools.cache
def find(name: str) -> tuple[Callable[..., Step], dict[str, Any]] | None:
    """The function for an instruction of this name, with the groups of its pattern; None if none knows it."""
    for module in _MODULES:
        importlib.import_module(f".{module}", __package__)
    for pattern, prepare in _known:
        if match := pattern.fullmatch(name):
            return prepare, match.groupdict()
    return None
