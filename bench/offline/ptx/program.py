"""Reads PTX: one kernel's instructions, labels, registers and parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(eq=False)
class Instruction:
    """One instruction.

    Attributes:
        line: of the PTX, from 1.
        source: "file:line" of the kernel, of the last `.loc` before it; empty without one.
        predicate: register that switches it, and whether inverted; None for one that is always carried out.
        name: with all modifiers, such as "ld.global.v4.b32".
        operands: as written, with names of inner scopes made unique.
        text: the statement.
    """

    line: int
    source: str
    predicate: tuple[str, bool] | None
    name: str
    operands: list[str]
    text: str

    @property
    def head(self) -> str:
        return self.name.partition(".")[0]

    @property
    def is_barrier(self) -> bool:
        """Whether it is a barrier of the whole program."""
        return re.fullmatch(r"(bar(\.cta)?|barrier(\.cta)?)\.sync(\.aligned)?", self.name) is not None


@dataclass
class Program:
    """A parsed kernel.

    Attributes:
        name: of the kernel.
        target: such as "sm_90a".
        instructions: in order.
        labels: of branch targets -> index of an instruction.
        registers: name -> pred, b16, b32 or b64.
        parameters: (name, type without the dot) in order.
        threads: of a program (`.reqntid`).
        shared: names of shared-memory symbols.
    """

    name: str = ""
    target: str = ""
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    parameters: list[tuple[str, str]] = field(default_factory=list)
    threads: int = 0
    shared: list[str] = field(default_factory=list)

    @property
    def capability(self) -> int:
        """90 for sm_90a."""
        return int(re.sub(r"\D", "", self.target))


_STATEMENT = re.compile(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_LABEL = re.compile(r"(\$?[\w$]+):(?!:)")
_NAME = re.compile(r"[%\w$]+")


def split_operands(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    found, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and not depth:
            found.append(text[start:place].strip())
            start = place + 1
    last = text[start:].strip()
    return [*found, last] if last else found


def parse(ptx: str) -> Program:
    """Read PTX with one kernel.

    Raises:
        ValueError: for a statement that is none, or PTX without a kernel.
    """
    reader = _Reader()
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]*)"', ptx, re.M))
    for number, line in enumerate(ptx.splitlines(), 1):
        if found := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            reader.source = f"{files.get(found[1], found[1])}:{found[2]}"
        reader.read(number, re.sub(r"//.*", "", line).strip())
    program = reader.program
    if not reader.ended or not program.threads:
        raise ValueError("ptx: got text without a whole kernel, allowed is PTX with one kernel and its .reqntid")
    targets = {one.operands[-1] for one in program.instructions if one.head == "bra"}
    if missing := [one for one in program.instructions if one.head == "bra" and one.operands[-1] not in program.labels]:
        raise ValueError(f"PTX line {missing[0].line}: got {missing[0].text!r}, allowed are labels of the kernel")
    program.labels = {name: place for name, place in program.labels.items() if name in targets}
    return program


class _Reader:
    """Reads line by line; a scope in braces renames its own registers and labels."""

    def __init__(self) -> None:
        self.program, self.source = Program(), ""
        self.body = self.ended = False
        self._number = 0
        self._scopes: list[dict[str, str]] = []
        self._renamed = 0
        self._pending = ""

    def read(self, number: int, line: str) -> None:
        self._number = number
        if not self.body:
            self._read_head(line)
            self.body = line == "{" and not self.ended
        elif line == "}" and not self._scopes and not self._pending:
            self.body, self.ended = False, True
        elif line and not line.startswith((".loc", ".file", ".section", ".pragma")):
            text = f"{self._pending} {line}" if self._pending else line
            self._pending = ""
            for statement in self._statements(text):
                self._add(number, statement)

    def _read_head(self, line: str) -> None:
        program = self.program
        if found := re.match(r"\.target\s+(\w+)", line):
            program.target = found[1]
        elif found := re.match(r"(?:\.visible\s+)?\.entry\s+([\w$]+)", line):
            if program.name:
                raise ValueError(f"PTX line {self._number}: got {line!r}, allowed is PTX with one kernel")
            program.name = found[1]
        elif found := re.match(r"\.param\s+\.(\w+).*?([\w$]+),?$", line):
            program.parameters.append((found[2], found[1]))
        elif found := re.match(r"\.reqntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", line):
            if int(found[2] or 1) * int(found[3] or 1) != 1:
                raise ValueError(f"PTX line {self._number}: got {line!r}, allowed are threads of one axis")
            program.threads = int(found[1])
        elif found := re.match(r"\.extern\s+\.shared\s+.*?([\w$]+)\[\];", line):
            program.shared.append(found[1])

    def _statements(self, text: str) -> Iterator[str]:
        """Whole statements; opens and closes scopes and sets labels on the way."""
        while text := text.strip():
            if text[0] == "{":
                self._scopes.append({})
                text = text[1:]
            elif text[0] == "}":
                if not self._scopes:
                    raise ValueError(f"PTX line {self._number}: got {text!r}, allowed is a brace that closes a scope")
                self._scopes.pop()
                text = text[1:]
            elif found := _LABEL.match(text):
                self._label(found[1])
                text = text[found.end() :]
            elif ";" not in text:
                self._pending = text
                return
            else:
                statement, _, text = text.partition(";")
                if statement.strip():
                    yield statement.strip()

    def _rename(self, name: str) -> str:
        self._renamed += 1
        self._scopes[-1][name] = f"{name}@{self._renamed}"
        return self._scopes[-1][name]

    def _is_known(self, label: str) -> bool:
        """Whether it is one of the innermost scope, or has been seen in one around it."""
        labels = self.program.labels
        return label in labels or label in self._scopes[-1] or any(one.get(label) in labels for one in self._scopes)

    def _label(self, name: str) -> None:
        if self._scopes:  # a branch may have named it before
            name = self._scopes[-1].get(name) or self._rename(name)
        self.program.labels[name] = len(self.program.instructions)

    def _declare(self, kind: str, names: str) -> None:
        kind = ("b" if kind[0] in "usf" else kind[0]) + kind[1:]
        for name in split_operands(names):
            many = re.match(r"(%?\w+)<(\d+)>", name)
            for one in [f"{many[1]}{index}" for index in range(int(many[2]))] if many else [name]:
                self.program.registers[self._rename(one) if self._scopes else one] = kind

    def _add(self, number: int, statement: str) -> None:
        if found := re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S):
            return self._declare(found[1], found[2])
        found = _STATEMENT.match(statement)
        if not found:
            raise ValueError(f"PTX line {number}: got {statement!r}, allowed is a statement of PTX")
        inverted, predicate, name, operands = found.groups()
        if name.startswith("bra") and self._scopes and operands[0] != "$" and not self._is_known(operands):
            self._rename(operands)  # a label further down in this scope
        names = {old: new for scope in self._scopes for old, new in scope.items()}
        if names:
            operands = _NAME.sub(lambda match: names.get(match[0], match[0]), operands)
        switch = (names.get(predicate, predicate), bool(inverted)) if predicate else None
        whole = Instruction(number, self.source, switch, name, split_operands(operands), statement)
        self.program.instructions.append(whole)
        return None
