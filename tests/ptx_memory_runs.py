"""Runs hand-written PTX on the machine, on tensors of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from effformer.bench.offline.ptx.execute import execute
from effformer.bench.offline.ptx.faults import Fault
from effformer.bench.offline.ptx.global_memory import GlobalMemory, Region
from effformer.bench.offline.ptx.machine import Launch, Options
from effformer.bench.offline.ptx.program import parse

Array = npt.NDArray[Any]
Output = tuple[tuple[int, ...], Any] | Array  # shape and type, or what it holds at first

FOLDER = Path(__file__).parent / "ptx"
FIRST, APART = 1 << 20, 1 << 20  # the address of the first tensor, and the steps to the next ones
SHARED = 64 << 10
REGISTERS = """\
    .reg .pred %p<16>;
    .reg .b16 %h<64>;
    .reg .b32 %r<64>, %c<256>, %t, %lane, %warp, %threads, %smem;
    .reg .b64 %rd<64>, %g<8>;"""


def kernel(body: str, *, pointers: int, threads: int = 32, target: str = "sm_90a") -> str:
    """A kernel around `body`, in which %g0, %g1, ... are the tensors, %t, %lane, %warp and
    %threads numbers, %smem shared memory."""
    parameters = ",\n".join(f"    .param .u64 .ptr .global .align 16 kernel_param_{n}" for n in range(pointers))
    loads = "\n".join(f"    ld.param.b64 %g{n}, [kernel_param_{n}];" for n in range(pointers))
    return f"""\
.version 9.0
.target {target}
.address_size 64
.extern .shared .align 1024 .b8 global_smem[];
.visible .entry kernel(
{parameters}
)
.reqntid {threads}
{{
{REGISTERS}
{loads}
    mov.u32 %t, %tid.x;
    mov.u32 %threads, %ntid.x;
    and.b32 %lane, %t, 31;
    shr.u32 %warp, %t, 5;
    mov.b32 %smem, global_smem;
{body}
    ret;
}}
"""


def run(
    ptx: str,
    *inputs: Array,
    outputs: Sequence[Output] = (),
    shared_memory: int = SHARED,
    programs: int = 1,
    options: Options | None = None,
    outside: Mapping[int, Array] | None = None,
) -> tuple[list[Array], list[Fault]]:
    """What the outputs hold afterwards, and the faults. `outside`: by tensor, the elements that do not belong to it."""
    memory, arrays = GlobalMemory(), list(inputs)
    arrays += [np.zeros(*one) if isinstance(one, tuple) else one.copy() for one in outputs]
    for place, array in enumerate(arrays):
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        is_output = place >= len(inputs)
        region = Region(f"tensor {place}", FIRST + place * APART, data, array.itemsize, is_output)
        region.outside = outside.get(place) if outside else None
        if is_output and not isinstance(outputs[place - len(inputs)], tuple):
            region.writes[:] = 1
        memory.add(region)
    launch = Launch((programs, 1, 1), shared_memory, [FIRST + place * APART for place in range(len(arrays))])
    outcome = execute(parse(ptx), launch, memory, options=options)
    return arrays[len(inputs) :], outcome.faults


def result(ptx: str, *inputs: Array, output: Output, **options: Any) -> Array:
    """The only output of a run without faults."""
    outputs, faults = run(ptx, *inputs, outputs=[output], **options)
    assert [str(fault) for fault in faults] == []
    return outputs[0]


def names(prefix: str, count: int, first: int = 0) -> str:
    """ "{%r0, %r1}" """
    return "{" + ", ".join(f"%{prefix}{first + place}" for place in range(count)) + "}"


def text(name: str) -> str:
    """A hand-written kernel of the folder."""
    return (FOLDER / f"{name}.ptx").read_text()
