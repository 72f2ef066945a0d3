"""Compile a launch without a GPU and read what came out: registers, spills, shared memory, instructions.

Needs a process that does not interpret (no TRITON_INTERPRET).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..kernels.launch import Launch

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_TENSOR_CORES = ("HGMMA", "UTCHMMA", "HMMA")
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)([^;]*);")


@dataclass(frozen=True)
class Compiled:
    """What a kernel became.

    Attributes:
        registers: a thread.
        shared_memory: bytes a program.
        spills: store and load instructions to local memory; `loop_spills` those within the hot loop.
        tensor_core: name and number of the matrix instructions (the whole kernel).
        instructions, loop: of the whole kernel, and of its hot loop by name (empty without one).
    """

    registers: int
    shared_memory: int
    spills: int
    loop_spills: int
    tensor_core: tuple[str, int]
    instructions: Counter[str]
    loop: Counter[str]


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Types, constants and attributes that Triton specialises this launch for; pointers count as aligned."""
    types: dict[str, str] = {}
    constants, attributes = dict(launch.constants), dict[tuple[int, ...], list[list[Any]]]()
    for index, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            types[name] = "constexpr"
            continue
        value = launch.arguments[name]
        divisible = False
        if value is None or (isinstance(value, int) and value == 1):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            types[name], divisible = "*" + _TYPES[value.dtype], True
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name], divisible = ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile for sm_<capability>. Raises what Triton raises, where it cannot."""
    types, constants, attributes = signature(launch)
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (registers,) = re.findall(r"REG:(\d+)", _cuobjdump("--dump-resource-usage", file.name))
        listing = _cuobjdump("-sass", file.name)
    code = [(int(m[1], 16), m[2], m[3]) for m in map(_INSTRUCTION.match, listing.splitlines()) if m]
    whole = Counter(name for _, name, _ in code)
    loop = _hot_loop(code)
    core = next(((name, whole[name]) for name in _TENSOR_CORES if whole[name]), ("none", 0))
    return Compiled(
        int(registers),
        compiled.metadata.shared,
        whole["STL"] + whole["LDL"],
        loop["STL"] + loop["LDL"],
        core,
        whole,
        loop,
    )


def _cuobjdump(*arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _hot_loop(code: list[tuple[int, str, str]]) -> Counter[str]:
    """The instructions of the innermost loop with the most tensor-core instructions."""
    best: Counter[str] = Counter()
    for address, name, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands) if name == "BRA" else None
        first = int(target[1], 16) if target else address
        if first >= address:
            continue
        body = Counter(other for at, other, _ in code if first <= at <= address)
        cores = sum(body[core] for core in _TENSOR_CORES)
        most = sum(best[core] for core in _TENSOR_CORES)
        if not best or cores > most or (cores == most and body.total() < best.total()):
            best = body
    return best
