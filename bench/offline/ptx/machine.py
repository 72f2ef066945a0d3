"""The state of a machine, and tools of the functions that prepare instructions.

Registers are arrays over lanes: programs x threads. A mask says which lanes take part where they have parted; None
stands for all. Each instruction is prepared once, as a function without arguments, and carried out by `schedule.run`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .counts import Counts
from .faults import Faults
from .global_memory import GlobalMemory
from .numbers import F32, F64, TYPES, U32, U64, UNSIGNED, Array, flush, width
from .program import Instruction, Program, split_operands
from .registry import Step, UnknownInstructionError, find
from .shared_memory import SHARED_BASE, SharedMemory

POISON = 0xDEADBEEF  # in registers that were not written
_REGISTERS: dict[str, Any] = {"pred": np.bool_, "b16": np.uint16, "b32": U32, "b64": U64}
_NAME = re.compile(r"%?[\w$]+(?:@\d+)?")


@dataclass(frozen=True)
class Options:
    """How to execute.

    Attributes:
        watch: whether to look for races and reads of what was never written. Bounds are always watched.
        fuse: whether products and the sums that follow become one operation, as ptxas may do without `.rn`.
        approximate: the share of their documented error by which approximate instructions of float32 (`ex2.approx`)
            are off; with 0 they are rounded correctly.
        truncate: whether matrix units cut sums off as measured on GPUs (arXiv 2512.07004); else they round once.
        count: whether to count traffic and instructions.
        seed: of the errors of approximations.
        patience: blocks of instructions that a run may take before it counts as endless.
    """

    watch: bool = True
    fuse: bool = False
    approximate: float = 0.0
    truncate: bool = False
    count: bool = False
    seed: int = 0
    patience: int = 2_000_000


@dataclass(frozen=True)
class Launch:
    """A launch: its grid, the bytes of shared memory of a program, and the bits of its parameters in order."""

    grid: tuple[int, int, int]
    shared_memory: int
    parameters: Sequence[int]


@dataclass
class Block:
    """Instructions that are carried out one after the other, and the branch, exit or barrier behind them."""

    steps: list[Callable[[], None]] = field(default_factory=list)
    targets: list[list[int]] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    end: Instruction | None = None  # a branch, an exit or a barrier


def merged(on: Array | None, new: Array, old: Array | None) -> Array:
    """`new` where `on`, elsewhere `old`; poison where there is none."""
    if on is None:
        return new
    if old is None:
        old = np.array(POISON & (1 << 8 * new.itemsize) - 1).astype(new.dtype)
    return np.where(on, new, old)


class Machine:
    """Runs programs (CTAs) of a kernel side by side, always the same number of them."""

    def __init__(
        self, program: Program, launch: Launch, memory: GlobalMemory, programs: int, options: Options, faults: Faults
    ) -> None:
        from .async_copies import AsyncCopies
        from .schedule import block_order
        from .tensor_memory import TensorMemory
        from .warpgroups import WarpgroupProducts

        if len(launch.parameters) != len(program.parameters):
            raise ValueError(
                f"parameters: got {len(launch.parameters)}, allowed are the {len(program.parameters)} of {program.name}"
            )
        self.program, self.launch, self.options, self.faults = program, launch, options, faults
        self.programs, self.threads = programs, program.threads
        self.lanes = programs * program.threads
        self.warps = self.lanes // 32
        self.lane = np.arange(self.lanes)
        self.program_of = self.lane // self.threads
        self.warp_of = self.lane // 32
        self.in_warp = self.lane % 32
        self.mask: Array | None = None
        self.counts = Counts(on=options.count)
        self.index = {name: place for place, name in enumerate(program.registers)}
        self.registers: list[Any] = [None] * len(self.index)
        self._constants: dict[tuple[str, int], int] = {}
        self.special = self._special()
        self.memory = memory
        self.shared = SharedMemory(self)
        self.copies = AsyncCopies(self)
        self.products = WarpgroupProducts(self)
        self.tensor = TensorMemory(self)
        self.blocks, self.block_of = self._prepare()
        self.order = block_order(self)

    # --- set-up ---

    def _special(self) -> dict[str, Array]:
        thread, zero = (self.lane % self.threads).astype(U32), np.zeros(self.lanes, U32)
        known = {"%tid.x": thread, "%laneid": self.in_warp.astype(U32), "%warpid": thread // U32(32)}
        known |= {"%tid.y": zero, "%tid.z": zero}
        sizes = {"ntid": (self.threads, 1, 1), "nctaid": self.launch.grid}
        for name, values in sizes.items():
            known |= {f"%{name}.{axis}": zero + U32(value) for axis, value in zip("xyz", values, strict=True)}
        known |= {f"%ctaid.{axis}": zero.copy() for axis in "xyz"}
        alone = ("%clusterid.x", "%clusterid.y", "%clusterid.z", "%cluster_ctarank", "%cluster_ctaid.x")
        return known | dict.fromkeys(alone, zero)

    def _prepare(self) -> tuple[list[Block], dict[int, int]]:
        from .schedule import ends_block

        code = self.program.instructions
        starts = {0} | set(self.program.labels.values())
        starts |= {place + 1 for place, one in enumerate(code) if ends_block(one)}
        ordered = sorted(start for start in starts if start <= len(code))
        blocks = []
        for first, last in zip(ordered, [*ordered[1:], len(code)], strict=True):
            body, block = code[first:last], Block()
            if body and ends_block(body[-1]):
                block.end = body.pop()
            fused = self._fusions(body) if self.options.fuse else {}
            for one in body:
                run, targets = self._step(one, fused.get(id(one)))
                block.steps.append(run)
                block.targets.append(targets)
                block.instructions.append(one)
            blocks.append(block)
        return blocks, {start: place for place, start in enumerate(ordered)}

    def _step(self, one: Instruction, fused: Sequence[Any] | None) -> Step:
        if fused:
            from .arithmetic import fused_step

            run, targets = fused_step(self, one, *fused)
        else:
            found = find(one.name)
            if found is None:
                raise UnknownInstructionError(one)
            prepare, groups = found
            try:
                run, targets = prepare(self, one, **groups)
            except (KeyError, ValueError) as error:  # an operand that is none
                raise ValueError(f"PTX line {one.line}: {one.text}: {error}") from error
        if one.predicate and not getattr(run, "predicated", False):
            run = self._switched(one, run, targets)
        return self._guarded(one, run, targets), targets

    def _switched(self, one: Instruction, run: Callable[[], None], targets: list[int]) -> Callable[[], None]:
        """Carry it out where the predicate is on, and keep the old values elsewhere."""
        registers = self.registers

        def switched() -> None:
            on, before = self.active(one), [registers[target] for target in targets]
            assert on is not None
            if not (on.any() or targets):
                return
            mask = self.mask
            if on.any() and not on.all():
                self.mask = on
            try:
                run()
            finally:
                self.mask = mask
            for target, old in zip(targets, before, strict=True):
                registers[target] = merged(on, registers[target], old)

        return switched

    def _guarded(self, one: Instruction, run: Callable[[], None], targets: list[int]) -> Callable[[], None]:
        """Look for registers that asynchronous work has not delivered yet, where the kernel has such registers."""
        late = self.products.late | self.tensor.late
        if one.head in ("wgmma", "tcgen05") or not late:
            return run
        used = {self.index[name] for name in _NAME.findall(" ".join(one.operands)) if name in self.index} & late
        if not used:
            return run

        def guarded() -> None:
            for register in used:
                self.products.check_delivered(one, register)
                self.tensor.check_delivered(one, register)
            if one.head != "mov" or not self.tensor.move_late(one, run, targets):
                run()

        return guarded

    def _fusions(self, body: list[Instruction]) -> dict[int, tuple[Any, ...]]:
        """Sums of a product in the same block: (sign of the product, a, b, sign of the other, other)."""
        products: dict[str, tuple[str, str]] = {}
        found: dict[int, tuple[Any, ...]] = {}
        for one in body:
            if one.name in ("add.f32", "sub.f32", "add.f32x2") and not one.predicate:
                (_, a, b), minus = one.operands, one.name == "sub.f32"
                if a in products:
                    found[id(one)] = (1, *products[a], -1 if minus else 1, b)
                elif b in products:
                    found[id(one)] = (-1 if minus else 1, *products[b], 1, a)
            for name in _NAME.findall(one.operands[0]) if one.operands else ():
                products = {key: two for key, two in products.items() if key != name and name not in two}
            if one.name in ("mul.f32", "mul.f32x2") and not one.predicate and one.operands[0] not in one.operands[1:]:
                products[one.operands[0]] = one.operands[1], one.operands[2]
        return found

    # --- operands ---

    def source(self, text: str, kind: str) -> int:
        """The index of a register, or of a constant of this type as one."""
        if text in self.index:
            return self.index[text]
        size = 1 if kind == "pred" else width(kind)
        key = text, -size if kind == "pred" else size
        if key not in self._constants:
            self._constants[key] = len(self.registers)
            self.registers.append(self._constant(text, kind, size))
        return self._constants[key]

    def _constant(self, text: str, kind: str, size: int) -> Array:
        if text in self.special:
            return self.special[text]
        if kind == "pred":
            return np.full(self.lanes, int(text, 0) != 0)
        if text in self.program.shared:
            value = SHARED_BASE
        elif text[:2] in ("0f", "0F", "0d", "0D"):
            value = int(text[2:], 16)
        else:
            try:
                value = int(text.rstrip("U"), 0)
            except ValueError:
                raise ValueError(f"PTX of {self.program.name}: got operand {text!r}, allowed is a register, a special "
                                 "register, a number or a shared-memory symbol") from None  # fmt: skip
        return np.full(self.lanes, value % (1 << 8 * size), UNSIGNED[size])

    def target(self, text: str) -> int:
        """The index of a register to write; "_" discards the value."""
        if text == "_":
            self.registers.append(None)
            return len(self.registers) - 1
        return self.index[text]

    def storage(self, text: str, default: Any = U32) -> Any:
        """The NumPy type of a register."""
        return _REGISTERS[self.program.registers[text]] if text in self.program.registers else default

    @staticmethod
    def listed(text: str) -> list[str]:
        """The operands in braces, or the one without."""
        return split_operands(text.strip()[1:-1]) if text.strip().startswith("{") else [text.strip()]

    def address(self, text: str, kind: str) -> Callable[[], Array]:
        """A function that gives the addresses (int64) of "[register + offset]"."""
        inner = text.strip().strip("[]").replace(" ", "")
        found = re.fullmatch(r"(%?[\w$]+(?:@\d+)?)(?:([+-])(-?\w+))?", inner)
        if not found:
            raise ValueError(f"PTX of {self.program.name}: got address {text!r}, allowed is [register + offset]")
        offset = int(found[3], 0) * (-1 if found[2] == "-" else 1) if found[3] else 0
        base, registers = self.source(found[1], kind), self.registers
        return lambda: registers[base].astype(np.int64) + offset

    # --- carrying out ---

    def lanewise(
        self, one: Instruction, kinds: Sequence[str], function: Callable[..., Array], operands: Sequence[str] = ()
    ) -> Step:
        """`function` of the operands (by default all but the first), seen as these types, into the first."""
        registers, target = self.registers, self.target(one.operands[0])
        given = operands or one.operands[1:]
        if len(given) != len(kinds):
            raise UnknownInstructionError(one, f"{len(given)} operands instead of {len(kinds)}")
        sources = [(self.source(text, kind), TYPES[kind]) for text, kind in zip(given, kinds, strict=True)]
        out = self.storage(one.operands[0])

        def run() -> None:
            registers[target] = function(*[registers[place].view(kind) for place, kind in sources]).view(out)

        return run, [target]

    def predicate(self, one: Instruction) -> Array:
        """Where the instruction's predicate is on, whatever the mask."""
        assert one.predicate is not None
        on: Array | None = self.registers[self.source(one.predicate[0], "pred")]
        if on is None:
            raise AttributeError(one.predicate[0])
        return ~on if one.predicate[1] else on

    def active(self, one: Instruction) -> Array | None:
        """The lanes that carry the instruction out; None for all."""
        if not one.predicate:
            return self.mask
        on = self.predicate(one)
        return on if self.mask is None else on & self.mask

    def on_warps(self, lanes: int = 32) -> Array | slice:
        """The warps (or groups of `lanes`) that the mask leaves."""
        if self.mask is None:
            return slice(None)
        found: Array = self.mask.reshape(-1, lanes).any(axis=1)  # type: ignore[assignment]
        return found

    def check_whole(self, one: Instruction, lanes: int = 32) -> None:
        """Look whether warps (or groups of `lanes`) take part as a whole."""
        active = self.active(one)
        if active is not None:
            groups = active.reshape(-1, lanes)
            broken = groups.any(1) != groups.all(1)
            if broken.any():
                what = "warp" if lanes == 32 else "warpgroup"
                self.faults.add(f"{one.head} by a part of a {what}", one, count=int(broken.sum()))

    def rounded(self, exact: Array, ulps: float, *, ftz: bool) -> Array:
        """float64 as the float32 of an approximate instruction, off by up to `ulps` where that is asked for."""
        result = exact.astype(F32)
        if ulps and self.options.approximate:
            # The same for the same value: threads that repeat a computation must agree.
            bits = (result.view(U32) ^ U32(self.options.seed)) * U32(0x9E3779B1)
            bits = (bits ^ bits >> U32(15)) * U32(0x85EBCA77)
            off = ((bits >> U32(8)).astype(F64) / 2**23 - 1) * ulps * self.options.approximate
            moved = (exact + off * np.spacing(np.abs(result)).astype(F64)).astype(F32)
            # Results for special values are exact: 2^0 and cos 0, tanh of an infinity.
            result = np.where(np.isfinite(result) & (result != 0) & (np.abs(exact) != 1), moved, result)
        return flush(result) if ftz else result

    def reset(self, programs: Sequence[int]) -> None:
        """Begin with these programs (linear numbers within the grid)."""
        x, y, _ = self.launch.grid
        self.ids = np.asarray(programs)
        number = np.repeat(self.ids, self.threads)
        for axis, value in zip("xyz", (number % x, number // x % y, number // (x * y)), strict=True):
            self.special[f"%ctaid.{axis}"][:] = value
        for place in self.index.values():
            self.registers[place] = None
        self.mask = None
        self.memory.begin_programs(self)
        for part in (self.shared, self.copies, self.products, self.tensor):
            part.reset()
