"""Faults that the machine finds. Each names the line of the PTX and that of the kernel's source.

Global memory: accesses out of bounds or misaligned, reads outside a tensor's elements, reads of what was never written,
writes to what is no output, races between programs, and between warps of one (between barriers).
Shared and tensor memory: accesses out of bounds or misaligned, reads of what was never written, races between warps
(between barriers) and within a warp (between `bar.warp.sync`), operands changed while a product reads them.
Asynchronous work: results used before the wait; work without a wait; missing `fence.proxy.async` and `wgmma.fence`
(`tcgen05.fence` is not watched).
Warp-wide instructions by a part of a warp; barriers that not all threads reach; registers read before they are written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .program import Instruction


@dataclass
class Fault:
    """Equal faults of one instruction.

    Attributes:
        kind: a description, equal for equal faults.
        line: of the PTX, from 1.
        source: "file:line" of the kernel; empty where the compiler says none.
        text: the instruction.
        detail: of the first.
        count: elements, lanes or places concerned.
    """

    kind: str
    line: int
    source: str
    text: str
    detail: str
    count: int = 1

    def __str__(self) -> str:
        if not self.line:
            return f"{self.kind} ({self.detail}): {self.text}"
        text = " ".join(self.text.split())
        text = text if len(text) <= 100 else text[:97] + "..."
        where = f"{self.source}, " if self.source else ""
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.kind}{detail}, {self.count} times: {where}PTX line {self.line}: {text}"


class Faults:
    """Collects faults; the first of a kind at an instruction gives the detail."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int], Fault] = {}

    def add(self, kind: str, instruction: Instruction, detail: str = "", count: int = 1) -> None:
        key = kind, instruction.line
        if key in self._found:
            self._found[key].count += count
        else:
            source, text = instruction.source, instruction.text
            self._found[key] = Fault(kind, instruction.line, source, text, detail, count)

    def all(self) -> list[Fault]:
        """The faults in the order of their lines."""
        return sorted(self._found.values(), key=lambda fault: fault.line)
