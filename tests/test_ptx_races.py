"""Races and borrowed memory that are easily missed: the last reader that writes, programs, mbarriers, memory apart."""

from __future__ import annotations

import json

import compiling
import numpy as np
import pytest
from effformer.bench.offline.ptx.registry import UnknownInstructionError
from ptx_memory_runs import kernel, run

VALUES = np.zeros(64, np.int32)


def faults(body: str, threads: int = 64, programs: int = 1) -> list[str]:
    _, found = run(kernel(body, pointers=1, threads=threads), outputs=[VALUES], programs=programs)
    return [str(fault) for fault in found]


READ = "ld.global.b32 %r1, [%g0];"


@pytest.mark.parametrize("writer", [0, 31, 32, 63])
def test_a_place_that_two_warps_read_and_one_writes(writer: int) -> None:
    """Whichever of them comes last; a barrier between mends it."""
    write = f"setp.eq.u32 %p1, %t, {writer}; @%p1 st.global.b32 [%g0], %r1;"
    assert any("write of what another warp read" in fault for fault in faults(READ + write))
    assert not faults(READ + "bar.sync 0;" + write)


@pytest.mark.parametrize("writer", [0, 1])
def test_a_place_that_two_programs_read_and_one_writes(writer: int) -> None:
    write = f"""
        mov.u32 %r2, %ctaid.x;
        setp.eq.u32 %p1, %r2, {writer};
        setp.eq.and.u32 %p2, %t, 0, %p1;
        @%p2 st.global.b32 [%g0], %r1;
    """
    found = faults(READ + "bar.sync 0;" + write, threads=32, programs=2)
    assert any("write of what another program read" in fault for fault in found)
    assert not faults(READ + write, threads=32)


def test_a_store_over_an_mbarrier() -> None:
    """Until it is given up."""
    body = """
        setp.eq.u32 %p1, %t, 0;
        @%p1 mbarrier.init.shared::cta.b64 [%smem], 1;
        bar.sync 0;
        FIRST
        bar.sync 0;
        @%p1 mbarrier.inval.shared::cta.b64 [%smem];
        bar.sync 0;
        LAST
    """
    store = "@%p1 st.shared.b32 [%smem + 4], %t;"
    assert not faults(body.replace("FIRST", "").replace("LAST", store))
    found = faults(body.replace("FIRST", store).replace("LAST", ""))
    assert [fault.partition(",")[0] for fault in found] == ["shared write to an mbarrier"]


def test_a_wait_of_one_warpgroup_alone() -> None:
    body = "setp.lt.u32 %p1, %t, 128; @%p1 wgmma.wait_group.sync.aligned 0;"
    with pytest.raises(UnknownInstructionError, match="by a part of a program"):
        faults(body, threads=256)


def test_a_copy_without_a_wait() -> None:
    """Also of zeros; one that is masked off is none."""
    copy = "cp.async.ca.shared.global [%smem], [%g0], 4, SIZE; cp.async.commit_group;"
    one = "setp.eq.u32 %p1, %t, 0; @%p1 "
    assert any("cp.async without a wait" in fault for fault in faults(one + copy.replace("SIZE", "4")))
    assert not faults(one + copy.replace("SIZE", "0"))


# --- over the driver --------------------------------------------------------------------------------------------------

OVER_THE_DRIVER = """
import copy, json
from unittest import mock
import torch
from effformer.apps.verify import checks
from effformer.bench.offline import execution, proof
from effformer.kernels.tiling.device import TARGETS
from effformer.testing import draw_case

found, code = {}, execution._code
(check,) = [one for one in checks(["efficientformer_l1"], ["pool_mixer"], [torch.bfloat16], batch_size=8)
            if one.shape[1] == 448]

def without_last_store(function):
    text, program = code(function)
    program = copy.copy(program)
    last = max(n for n, one in enumerate(program.instructions) if one.name.startswith("st.global"))
    program.instructions = program.instructions[:last] + program.instructions[last + 1:]
    program.labels = {name: place - (place > last) for name, place in program.labels.items()}
    return text, program

def further(function):
    text, program = copy.deepcopy(code(function))
    load = next(one for one in program.instructions if one.name.startswith("ld.global"))
    load.operands[1] = load.operands[1].replace("+ 0", f"+ {found['bytes']}")
    return text, program

found["right"] = proof.run(proof.Task(check, 80)).faults
with mock.patch.object(execution, "_code", without_last_store):
    record = proof.run(proof.Task(check, 80))
found["sampled"] = [record.passes, *record.faults]

case = draw_case("pool_mixer", (1, 48, 14, 14), torch.bfloat16)
x, scale = case.arguments
found["bytes"] = scale.data_ptr() - x.data_ptr()  # from one tensor into the other
with mock.patch.object(execution, "_code", further):
    with execution.executing(TARGETS[80]) as ran:
        case.run("triton")
found["other"] = [str(fault) for _, fault in ran.faults]
try:
    with execution.executing(TARGETS[80]), execution.executing(TARGETS[90]):
        pass
except RuntimeError as error:
    found["nested"] = str(error)

def interrupted(function):
    raise KeyboardInterrupt

try:
    with mock.patch.object(execution, "_code", interrupted), execution.executing(TARGETS[80]):
        case.run("triton")
except KeyboardInterrupt:
    found["interrupted"] = True
with execution.executing(TARGETS[80]) as again:
    case.run("triton")
found["again"] = [len(again.executed), *(str(fault) for _, fault in again.faults)]
print(json.dumps(found))
"""


@compiling.needs_compiler
def test_over_the_driver() -> None:
    """A sampled proof misses no store; tensors lie apart; `executing` within another, Ctrl-C, and a run after them."""
    found = json.loads(compiling.run("-c", OVER_THE_DRIVER))
    assert found["right"] == []
    assert found["sampled"][0] is False
    assert "elements of the output are not written 1 times" in found["sampled"][1]
    assert any("global read out of bounds" in fault for fault in found["other"])
    assert "within another" in found["nested"]
    assert found["interrupted"]
    assert found["again"] == [1]
