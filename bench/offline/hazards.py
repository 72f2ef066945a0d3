"""Finds two known faults of compilers in compiled code, whose source is right.

Tensor memory, sm_100: Triton 3.6 and 3.7 read a product's accumulator while a later product on it still runs, where
pipelined products are chained (github.com/triton-lang/triton/issues/10821). It shows in Triton's GPU dialect.

Registers, sm_90: ptxas before 13.3 may write to registers that an asynchronous product still reads as its operand
(github.com/triton-lang/triton/issues/9433). It shows in the machine code.
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Sequence

Instruction = tuple[int, str, str]  # address, name, the rest of the line

_VALUE = r"%[\w$.-]+(?:#\d+)?"
_LOOP = re.compile(rf"^(\s*)(?:({_VALUE})(?::\d+)? = )?scf\.for .*?(?:iter_args\((.*?)\) ->|$)")
_ITERATED = re.compile(rf"({_VALUE}) = ({_VALUE})")
_PART = re.compile(rf"({_VALUE}) = ttg\.memdesc_(?:index|subslice|subview|reinterpret|trans)\w* ({_VALUE})")
_PRODUCT = re.compile(rf"ttng\.tc_gen5_mma(?:_scaled)? {_VALUE}, {_VALUE}, ({_VALUE})(.*?)(?: : |$)")
_BARRIER = re.compile(rf"({_VALUE})\[%\w+\]")
_COMMIT = re.compile(rf"ttng\.tc_gen5_commit ({_VALUE})")
_WAIT = re.compile(rf"ttng\.wait_barrier ({_VALUE})")
_ACCESS = re.compile(rf"ttng\.tmem_(load|store) (?:{_VALUE}, )?({_VALUE})")


def early_accesses(ttgir: str) -> list[str]:
    """Loads and stores of an accumulator in tensor memory while a product on it may still run, as lines of TTGIR."""
    walk = _Walk(ttgir.splitlines())
    walk.run(0, len(walk.lines))
    return list(dict.fromkeys(walk.found))


class _Walk:
    """Follows products to the barriers that they arrive at, in the order of the text; loops are run twice.

    The waits for a barrier end its products one after the other, oldest first, as the GPU does.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = lines
        self.found: list[str] = []
        self.same: dict[str, str] = {}  # a value -> the one that it is part of, or has in a loop's first round
        self.running: defaultdict[str | None, deque[str]] = defaultdict(deque)  # barrier -> accumulators

    def root(self, value: str) -> str:
        while value in self.same:
            value = self.same[value]
        return value

    def run(self, first: int, end: int) -> None:
        at = first
        while at < end:
            line = self.lines[at]
            if (loop := _LOOP.match(line)) and line.rstrip().partition(" loc(")[0].endswith("{"):
                last = self._end_of(at, loop[1])
                for index, (inner, outer) in enumerate(_ITERATED.findall(loop[3] or "")):
                    self.same[inner] = outer
                    self.same[f"{loop[2]}#{index}"] = outer
                    if index == 0 and loop[2]:
                        self.same.setdefault(loop[2], outer)
                for _ in range(2):
                    self.run(at + 1, last)
                at = last
            else:
                self._line(line)
            at += 1

    def _end_of(self, at: int, indent: str) -> int:
        """The line that closes the loop which starts at `at`."""
        for number in range(at + 1, len(self.lines)):
            if self.lines[number].startswith(indent + "}"):
                return number
        raise ValueError(f"ttgir: the loop in line {at + 1} has no end")

    def _line(self, line: str) -> None:
        if part := _PART.search(line):
            self.same[part[1]] = part[2]
        elif product := _PRODUCT.search(line):
            barrier = _BARRIER.search(product[2])
            self.running[self.root(barrier[1]) if barrier else None].append(self.root(product[1]))
        elif commit := _COMMIT.search(line):
            self.running[self.root(commit[1])].extend(self.running.pop(None, ()))
        elif wait := _WAIT.search(line):
            if waiting := self.running[self.root(wait[1])]:
                waiting.popleft()
        elif access := _ACCESS.search(line):
            accumulator = self.root(access[2])
            if any(accumulator in waiting for waiting in self.running.values()):
                self.found.append(re.sub(r" loc\(.*| : .*", "", line).strip())


def overwritten_operands(instructions: Sequence[Instruction], loops: Sequence[tuple[int, int]]) -> list[str]:
    """Writes to registers that a product of sm_90 may still read as its first operand, as lines of machine code.

    `loops`: (first, last) address of each; they are run twice.
    """
    found, groups, open_group = [], deque[set[int]](), set[int]()
    for name, operands in _unrolled(instructions, loops):
        tokens = [token.strip() for token in operands.split(" ", 1)[-1].split(",")]
        written = _written(name, operands, tokens)
        if any(register in group for register in written for group in (*groups, open_group)):
            found.append(f"{name}{operands}".strip())
        if name == "HGMMA":
            if operand := re.fullmatch(r"R(\d+)", tokens[1]):  # 64 rows of 32 bytes over 128 threads
                open_group |= set(range(int(operand[1]), int(operand[1]) + 4))
            if "gsb0" in operands:
                groups.append(open_group)
                open_group = set()
        elif name == "WARPGROUP" and (wait := re.search(r"DEPBAR\.LE gsb0, 0x([0-9a-f]+)", operands)):
            while len(groups) > int(wait[1], 16):
                groups.popleft()
    return list(dict.fromkeys(found))


def _unrolled(instructions: Sequence[Instruction], loops: Sequence[tuple[int, int]]) -> list[tuple[str, str]]:
    places = {address: index for index, (address, _, _) in enumerate(instructions)}
    ends = {places[last]: places[first] for first, last in loops}
    order: list[tuple[str, str]] = []
    index = 0
    while index < len(instructions):
        order.append(instructions[index][1:])
        index = ends.pop(index, index + 1)
    return order


def _written(name: str, operands: str, tokens: Sequence[str]) -> range:
    """The registers that an instruction writes."""
    if name.startswith(("ST", "RED", "BRA", "BAR", "WARPGROUP", "WARPSYNC", "SYNCS", "UTMA")) or name.endswith("SETP"):
        return range(0)
    target = next((token for token in tokens if not re.fullmatch(r"!?U?P(\d|T)", token)), "")
    register = re.fullmatch(r"R(\d+)(?:\.\w+)?", target)
    if register is None:
        return range(0)
    shape = re.match(r"\.64x(\d+)x", operands)
    if name == "HGMMA" and shape:
        count = int(shape[1]) // 2
    elif ".128" in operands or (name == "LDSM" and ".4 " in operands):
        count = 4
    elif ".64" in operands or "WIDE" in operands or name == "CS2R" or (name == "LDSM" and ".2 " in operands):
        count = 2
    else:
        count = 1
    return range(int(register[1]), int(register[1]) + count)
