"""Compile the kernels without a GPU and count registers, spills, shared memory and instructions of the result.

Compiling needs a process that does not interpret (no TRITON_INTERPRET); describing a kernel does not.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ...files import write_whole
from ...kernels.launch import SIZES, Launch
from . import hazards
from .hazards import early_accesses, overwritten_operands

# By device class. Those of Hopper and Blackwell need tiles of 64 rows; smaller ones take HMMA there, too.
TENSOR_CORES = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.uint8: "u8", torch.int64: "i64"}
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)([^;]*);")


@dataclass(frozen=True)
class Source:
    """Everything beside its code that a compiled kernel depends on, as plain data.

    Attributes:
        kernel: "module:name".
        types, constants, attributes: as Triton specialises the kernel; see `source_of`.
        options: num_warps, num_stages and others of Triton's compiler.
        capability: of the target, 90 for sm_90.
    """

    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, Any]
    capability: int

    @property
    def without_attributes(self) -> str:
        """A key that is equal for kernels whose arguments differ only in divisibility."""
        return json.dumps([self.kernel, self.types, self.constants, self.options, self.capability])


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel in numbers.

    Attributes:
        registers: a thread.
        shared_memory: bytes a program.
        spill_stores, spill_loads: instructions to and from local memory; `loop_spills` both within any loop.
        tensor_cores: name -> number of matrix instructions, in the whole kernel.
        waits, products: WARPGROUP and HGMMA instructions of the hot loop; see `serialised`.
        instructions, loop_instructions: of the whole kernel, and of its hot loop (0 without one).
        loop_mufu: of these, those of the multi-function unit (exponentials, reciprocals).
        hazards: faults of compilers that `hazards` found in it.
    """

    registers: int
    shared_memory: int
    spill_stores: int
    spill_loads: int
    loop_spills: int
    tensor_cores: dict[str, int]
    waits: int
    products: int
    instructions: int
    loop_instructions: int
    loop_mufu: int
    hazards: list[str] = field(default_factory=list)

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads

    @property
    def serialised(self) -> bool:
        """Whether ptxas waits for each of Hopper's asynchronous products before the next, with two waits for each."""
        return self.waits > self.products


def source_of(launch: Launch, capability: int) -> Source:
    """The kernel that Triton would compile for this launch on sm_<capability>; pointers count as aligned."""
    types: dict[str, str] = {}
    constants, attributes = dict(launch.constants), dict[tuple[int, ...], list[list[Any]]]()
    function = launch.kernel.fn
    for index, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            types[name] = "constexpr"
            continue
        value = launch.arguments[name]
        divisible = False
        special = name not in SIZES
        if value is None or (special and isinstance(value, int) and value == 1):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            types[name], divisible = "*" + _TYPES[value.dtype], True
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name], divisible = ("i32" if -(2**31) <= value < 2**31 else "i64"), special and value % 16 == 0
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    kernel = f"{function.__module__}:{function.__name__}"
    return Source(kernel, types, constants, attributes, launch.options, capability)


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile for sm_<capability>. Triton's errors pass through."""
    return compile_source(source_of(launch, capability))


def compile_source(source: Source, cache: Path | None = None) -> Compiled:
    """Compile, or read the result of an earlier call from the folder `cache`. Triton's errors pass through."""
    module, _, name = source.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    if cache is None:
        return _compile(kernel, source)
    readers: tuple[Any, ...] = _compile, _loops, _hot_loop, hazards
    reader = "".join(map(inspect.getsource, readers)) + _INSTRUCTION.pattern
    key = [kernel.cache_key, repr(source), triton.__version__, reader]
    file = cache / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.json"
    if file.exists():
        return Compiled(**json.loads(file.read_text(encoding="utf-8")))
    compiled = _compile(kernel, source)
    write_whole(file, json.dumps(asdict(compiled)))
    return compiled


def _compile(kernel: Any, source: Source) -> Compiled:
    code = ASTSource(fn=kernel, signature=source.types, constexprs=source.constants, attrs=source.attributes)
    options = dict(source.options)
    compiled = triton.compile(code, target=GPUTarget("cuda", source.capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (registers,) = re.findall(r"REG:(\d+)", _cuobjdump("--dump-resource-usage", file.name))
        listing = _cuobjdump("-sass", file.name)
    instructions = [(int(m[1], 16), m[2], m[3]) for m in map(_INSTRUCTION.match, listing.splitlines()) if m]
    whole = Counter(name for _, name, _ in instructions)
    loops = _loops(instructions)
    loop = _hot_loop(instructions, loops)
    accesses, writes = early_accesses(compiled.asm["ttgir"]), overwritten_operands(instructions, loops)
    return Compiled(
        registers=int(registers),
        shared_memory=compiled.metadata.shared,
        spill_stores=whole["STL"],
        spill_loads=whole["LDL"],
        loop_spills=sum(
            any(first <= at <= last for first, last in loops) for at, name, _ in instructions if name in ("STL", "LDL")
        ),
        tensor_cores={name: whole[name] for name in sorted(set(TENSOR_CORES.values())) if whole[name]},
        waits=loop["WARPGROUP"],
        products=loop["HGMMA"],
        instructions=whole.total(),
        loop_instructions=loop.total(),
        loop_mufu=loop["MUFU"],
        hazards=[
            *(f"an accumulator is touched while a product on it runs: {line}" for line in accesses),
            *(f"a register is written that a product reads: {line}" for line in writes),
        ],
    )


def _cuobjdump(*arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _loops(instructions: list[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """(first, last) address of every loop, which ends in a backward branch to its start.

    Code behind the last exit only waits longer than usual, and branches back: these branches are not loops.
    """
    end = max((address for address, name, _ in instructions if name == "EXIT"), default=-1)
    loops = []
    for address, name, operands in instructions:
        target = re.search(r"0x([0-9a-f]+)", operands) if name == "BRA" else None
        first = int(target[1], 16) if target else address
        if first < address and not first <= end < address:
            loops.append((first, address))
    return loops


def _hot_loop(instructions: list[tuple[int, str, str]], loops: list[tuple[int, int]]) -> Counter[str]:
    """The instructions of the innermost loop with the most tensor-core instructions."""
    bodies = [Counter(name for at, name, _ in instructions if first <= at <= last) for first, last in loops]
    cores = [sum(body[name] for name in set(TENSOR_CORES.values())) for body in bodies]
    ranked = sorted(range(len(bodies)), key=lambda index: (-cores[index], bodies[index].total()))
    return bodies[ranked[0]] if ranked else Counter()
