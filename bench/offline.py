"""Compile the kernels without a GPU and read what came out: registers, spills, shared memory, instructions.

`python -m effformer.bench.offline` prints a table for every kernel of L1; --help tells of other models and targets.
Needs a process that does not interpret (no TRITON_INTERPRET).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..config import PRESETS
from ..kernels.attention_mixer import attention_mixer_launches
from ..kernels.device import AMPERE, BLACKWELL, HOPPER, Device, stand_in
from ..kernels.launch import INTERPRETED, Launch
from ..kernels.linear_mlp import linear_mlp_launches
from ..kernels.meta4d import meta4d_launches

DEVICES = {device.capability: device for device in (AMPERE, HOPPER, BLACKWELL)}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

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


def network_launches(
    name: str, dtype: torch.dtype, device: Device, *, batch: int = 256, size: int = 224
) -> Iterator[tuple[str, Launch]]:
    """(stage and operator, launch) of one block of each kind in each stage of a published model; nothing is allocated.

    channels_last maps of [batch, C, size / 4, ...], on `device`.
    """
    config = PRESETS[name]

    def empty(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    with stand_in(device):
        for stage, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            side, hidden = size // (4 << stage), int(width * config.mlp_ratio)
            w1, w2 = empty(hidden, width, of=dtype), empty(width, hidden, of=dtype)
            c, h = empty(width), empty(hidden)
            last = stage == len(config.widths) - 1
            if not last or depth > config.num_vit:
                x = empty(batch, side, side, width, of=dtype).permute(0, 3, 1, 2)
                for launch in meta4d_launches(x, c, w1, h, h, w2, c, c, config.act, out=torch.empty_like(x)):
                    yield f"stage {stage + 1} meta4d", launch
            if last and config.num_vit:
                tokens, values = empty(batch, side**2, width, of=dtype), config.num_heads * config.value_dim
                channels = values + 2 * config.num_heads * config.key_dim
                qkv, proj = empty(channels, width, of=dtype), empty(width, values, of=dtype)
                bias, out = empty(config.num_heads, side**2, side**2), torch.empty_like(tokens)
                heads = (config.num_heads, config.key_dim)
                vectors = (c, c, qkv, empty(channels), bias, proj, c, c)
                for launch in attention_mixer_launches(tokens, *vectors, *heads, 1e-5, out=out):
                    yield f"stage {stage + 1} attention_mixer", launch
                for launch in linear_mlp_launches(tokens, c, c, w1, h, w2, c, c, config.act, 1e-5, out=out):
                    yield f"stage {stage + 1} linear_mlp", launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientformer_l1", choices=sorted(PRESETS))
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90], choices=sorted(DEVICES), metavar="SM")
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16", "float32"], choices=sorted(DTYPES))
    arguments = parser.parse_args()
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: this process interprets, and compiles nothing")
    print(f"triton {triton.__version__}, {arguments.model}, batch 256 at 224x224")
    columns = ("target", "dtype", "operator", "kernel", "warps", "regs", "shared", "spills", "in loop")
    widths = (6, 8, 23, 22, 5, 4, 6, 6, 7)
    head = "  ".join(f"{column:<{width}}" for column, width in zip(columns, widths, strict=True))
    print(f"{head}  tensor cores  instructions  in loop")
    for target in arguments.targets:
        for dtype in arguments.dtypes:
            for operator, launch in network_launches(arguments.model, DTYPES[dtype], DEVICES[target]):
                found = compile_launch(launch, target)
                row = (
                    *(f"sm_{target}", dtype, operator, launch.kernel.__name__, launch.num_warps),
                    *(found.registers, found.shared_memory, found.spills, found.loop_spills),
                )
                text = "  ".join(f"{value:<{width}}" for value, width in zip(row, widths, strict=True))
                core = f"{found.tensor_core[1]} {found.tensor_core[0]}"
                print(f"{text}  {core:<12}  {found.instructions.total():<12}  {found.loop.total()}", flush=True)


if __name__ == "__main__":
    main()
