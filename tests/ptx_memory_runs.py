"""Kernels around a few instructions, and their results and faults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ptx_runs
from effformer.bench.offline.ptx.faults import Fault
from effformer.bench.offline.ptx.machine import Options
from ptx_runs import Array, Output

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
    ran = ptx_runs.run(ptx, *inputs, outputs=outputs, shared_memory=shared_memory, programs=programs, options=options,
                       outside=outside)  # fmt: skip
    return ran.outputs, ran.faults


def result(ptx: str, *inputs: Array, output: Output, **options: Any) -> Array:
    """The only output of a run without faults."""
    outputs, faults = run(ptx, *inputs, outputs=[output], **options)
    assert [str(fault) for fault in faults] == []
    return outputs[0]


def names(prefix: str, count: int, first: int = 0) -> str:
    """ "{%r0, %r1}" """
    return "{" + ", ".join(f"%{prefix}{first + place}" for place in range(count)) + "}"
