"""Faults to plant in compiled code: for each kind its statements and their replacements."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .ptx.accesses import access_size
from .ptx.program import Instruction, Program

_REGISTER = re.compile(r"%\w+")
_ARITHMETIC = {
    "add", "sub", "mul", "mad", "and", "or", "xor", "shl", "shr", "bfe", "bfi", "shf", "lop3", "prmt", "mov", "selp",
    "cvt",
}  # fmt: skip
_GROUPS = r"(?:cp\.async|wgmma)\.wait_group"
_SPANS = {90: (62, (1, 2, 3)), 100: (61, (2, 4, 6))}  # target -> first bit, values of a descriptor's swizzle


@dataclass(frozen=True)
class Change:
    """One statement changed.

    Attributes:
        kind: of `KINDS`.
        line: of the PTX, from 1.
        source: "file:line" of the kernel.
        old: the statement.
        new: what stands in its place; empty for one that is removed.
    """

    kind: str
    line: int
    source: str
    old: str
    new: str

    def apply(self, ptx: str) -> str:
        """The PTX with the change.

        Raises:
            ValueError: where the statement does not stand there once.
        """
        lines = ptx.split("\n")
        if lines[self.line - 1].count(self.old) != 1:
            raise ValueError(f"line {self.line}: got {lines[self.line - 1]!r}, allowed is one with {self.old!r} once")
        lines[self.line - 1] = lines[self.line - 1].replace(self.old, self.new)
        return "\n".join(lines)


def changes(program: Program, ptx: str) -> dict[str, list[Change]]:
    """All changes of a kernel, by kind."""
    lines = ptx.split("\n")
    whole = [one for one in program.instructions if lines[one.line - 1].count(one.text) == 1]
    return {
        kind: [
            Change(kind, one.line, one.source, one.text, new) for one, new in find(program, whole) if new != one.text
        ]
        for kind, find in KINDS.items()
    }


Found = Iterator[tuple[Instruction, str]]


def _removed(*patterns: str) -> Callable[[Program, list[Instruction]], Found]:
    """Statements of these names, taken out."""

    def find(program: Program, code: list[Instruction]) -> Found:
        return ((one, "") for one in code if any(re.fullmatch(pattern, one.name) for pattern in patterns))

    return find


def _waits(program: Program, code: list[Instruction]) -> Found:
    """Waits, and the branches that ask a barrier again."""
    yield from _removed(_GROUPS + r"(?:\.sync\.aligned)?", r"cp\.async\.wait_all", r"tcgen05\.wait::.*")(program, code)
    asked = {one.operands[0] for one in program.instructions if one.name.startswith("mbarrier.try_wait")}
    yield from ((one, "") for one in code if one.head == "bra" and one.predicate and one.predicate[0] in asked)


def _weaker_waits(program: Program, code: list[Instruction]) -> Found:
    for one in code:
        if re.match(_GROUPS, one.name):
            yield one, re.sub(r"(\d+)\s*$", lambda found: str(int(found[1]) + 1), one.text)


def _masked(one: Instruction) -> bool:
    return one.head in ("ld", "st", "red", "atom") and one.predicate is not None and ".param" not in one.name


def _without_masks(program: Program, code: list[Instruction]) -> Found:
    for one in code:
        if _masked(one):
            yield one, re.sub(r"^@!?%\w+\s+", "", one.text)
        elif one.name.startswith(("cp.async.ca.", "cp.async.cg.")) and len(one.operands) == 4:
            yield one, one.text.rpartition(",")[0]


def _inverted_masks(program: Program, code: list[Instruction]) -> Found:
    for one in code:
        if _masked(one):
            yield one, one.text.replace("@!", "@", 1) if one.text.startswith("@!") else "@!" + one.text[1:]


def _shuffles(program: Program, code: list[Instruction]) -> Found:
    """Half the distance, or another lane."""
    for one in code:
        by = one.operands[2] if one.head == "shfl" else ""
        if by.isdigit():
            other = int(by) // 2 if ".bfly" in one.name and int(by) > 1 else int(by) + 1
            yield one, re.sub(rf",\s*{by}(\s*,[^,]*,[^,]*)$", rf", {other}\1", one.text)


# --- addresses --------------------------------------------------------------------------------------------------------


def _address(one: Instruction, space: str) -> str:
    """The operand that addresses "shared" or "global" memory; empty without one."""
    if one.name.startswith(("cp.async.ca.", "cp.async.cg.")):
        return one.operands[0 if space == "shared" else 1]
    if not re.search(rf"\.{space}\b", one.name) or one.head not in ("ld", "st", "ldmatrix", "stmatrix", "red"):
        return ""
    return one.operands[0 if one.head in ("st", "stmatrix", "red") else 1]


def _behind(program: Program, roots: set[str]) -> set[int]:
    """Lines of the integer arithmetic that these registers come from."""
    known, lines, todo = set(roots), set[int](), list(roots)
    writers: dict[str, list[Instruction]] = {}
    for one in program.instructions:
        if one.head in _ARITHMETIC and one.operands and not one.name.endswith((".f32", ".pred")):
            writers.setdefault(one.operands[0], []).append(one)
    while todo:
        for one in writers.get(todo.pop(), []):
            lines.add(one.line)
            new = set(_REGISTER.findall(" ".join(one.operands[1:]))) - known
            known |= new
            todo += new
    return lines


def _roots(program: Program, space: str) -> set[str]:
    return {name for one in program.instructions for name in _REGISTER.findall(_address(one, space))}


def _constant(one: Instruction) -> int | None:
    """The last operand, if it is a number."""
    text = one.operands[-1] if len(one.operands) > 2 else ""
    return int(text, 0) if re.fullmatch(r"-?(?:0x[\da-fA-F]+|\d+)", text) else None


def _with_constant(one: Instruction, value: int) -> str:
    return re.sub(r"[-\w]+\s*$", str(value), one.text)


def _swizzles(program: Program, code: list[Instruction]) -> Found:
    """Constants of a xor, a shift or a mask behind an address in shared memory; the mode of a descriptor."""
    behind = _behind(program, _roots(program, "shared"))
    for one in code:
        number = _constant(one)
        if number is None:
            continue
        if one.line in behind and one.name == "xor.b32":
            yield one, _with_constant(one, number * 2)
        elif one.line in behind and one.name in ("shl.b32", "shr.u32") and number > 1:
            yield one, _with_constant(one, number - 1)
        elif one.line in behind and one.name == "and.b32" and number > 15:
            yield one, _with_constant(one, number & number - 1)
        elif one.name == "or.b64" and abs(number) >= 1 << 61 and program.capability in _SPANS:
            first, modes = _SPANS[program.capability]
            word = number % (1 << 64)
            other = modes[(modes.index(word >> first) + 1) % len(modes)] if word >> first in modes else modes[0]
            word = word & (1 << first) - 1 | other << first
            yield one, _with_constant(one, word - (1 << 64) if word >> 63 else word)


def _indices(program: Program, code: list[Instruction]) -> Found:
    """The next place instead of an access's own; another constant behind an address in global memory."""
    behind = _behind(program, _roots(program, "global"))
    for one in code:
        text = _address(one, "shared") or _address(one, "global")
        if text and one.head in ("ld", "st", "red") and ".param" not in one.name:
            yield one, _moved(one, text, access_size(one))
        elif text:
            yield one, _moved(one, text, 16)
        elif one.line in behind and one.name in ("add.s32", "add.s64", "mul.lo.s32", "or.b32"):
            number = _constant(one)
            if number is not None and number > 0:
                yield one, _with_constant(one, number + 8)


def _moved(one: Instruction, address: str, by: int) -> str:
    found = re.search(r"\+\s*(-?\d+)\s*\]", address)
    if not found:
        return one.text.replace(address, address.rstrip("] ") + f" + {by}]", 1)
    return one.text.replace(address, f"{address[: found.start()]}+ {int(found[1]) + by}]", 1)


# --- matrix units -----------------------------------------------------------------------------------------------------


def _products(program: Program, code: list[Instruction]) -> Found:
    """A matrix transposed or not, registers swapped, another sum added to, another layout of an operand."""
    products = [one for one in program.instructions if one.name.startswith("tcgen05.mma")]
    sums, forms = {one.operands[4] for one in products}, {one.operands[3] for one in products}
    for one in code:
        if one.head == "ldmatrix":
            yield (
                one,
                one.text.replace(".trans", "")
                if ".trans" in one.text
                else one.text.replace(".shared", ".trans.shared"),
            )
        elif one.name.startswith("mma.sync"):
            groups = re.findall(r"\{[^}]*\}", one.text)
            names = [name.strip() for name in groups[1].strip("{}").split(",")]
            names[1], names[2] = names[2], names[1]
            yield one, one.text.replace(groups[1], "{ " + ", ".join(names) + " }", 1)
        elif one.name.startswith("wgmma.mma"):
            keep = one.operands[3]
            other = "1" if keep == "0" else "0"
            yield one, re.sub(rf"{keep}(\s*,\s*1\s*,\s*1\b[^}}]*)$", rf"{other}\1", one.text)
        elif one.name.startswith("tcgen05.mma") and not one.operands[1].startswith("["):
            a, b = one.operands[1:3]
            yield one, one.text.replace(f"{a}, {b}", f"{b}, {a}")
        elif one.name == "mov.pred" and one.operands[0] in sums:
            yield one, _with_constant(one, -1 if one.operands[1] == "0" else 0)
        elif one.name == "mov.b32" and one.operands[0] in forms and one.operands[1].isdigit():
            yield one, _with_constant(one, int(one.operands[1]) ^ 1 << 16)


KINDS: dict[str, Callable[[Program, list[Instruction]], Found]] = {
    "barrier removed": _removed(r"bar\.sync"),
    "warp barrier removed": _removed(r"bar\.warp\.sync"),
    "wait removed": _waits,
    "wait weakened": _weaker_waits,
    "commit removed": _removed(r"cp\.async\.commit_group", r"wgmma\.commit_group.*", r"tcgen05\.commit.*"),
    "fence removed": _removed(r"fence\.proxy\.async.*", r"wgmma\.fence.*"),
    "mask dropped": _without_masks,
    "mask inverted": _inverted_masks,
    "shuffle changed": _shuffles,
    "swizzle changed": _swizzles,
    "index changed": _indices,
    "matrix instruction changed": _products,
}
