"""Compiled kernels, executed on the CPU: every kernel once, and agreement with Triton's interpreter."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from compiling import TESTS, needs_compiler, run
from effformer.bench.offline.audit import jobs
from effformer.kernels.launch import recorded
from effformer.kernels.tiling.device import TARGETS, stand_in
from executed_worker import Call
from torch import Tensor

from effformer.testing import draw_case, float32_as_such


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_kernel_once_in_bfloat16(tmp_path: Path, capability: int) -> None:
    """A small network with its fold, and the kernels that it lacks: right by the accuracy rule, and without a fault.

    test_backward.py and test_train_mode.py do so with the kernels of gradients and of training.
    """
    output = tmp_path / "executed.jsonl"
    command = ["--part", "--targets", str(capability), "--workers", "1", "--output", str(output)]
    run("-m", "effformer.bench.offline.prove", *command)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(record["passes"] for record in records)
    kernels = {one["kernel"] for record in records for one in record["kernels"]}
    all_jobs, _ = jobs(["efficientformer_l1"], [capability], ["bfloat16"])
    inference = [job for job in all_jobs if not job.operation.endswith(("_backward", "_train"))]
    assert kernels == {job.kernel for job in inference}


# --- agreement with the interpreter -----------------------------------------------------------------------------------

OPERATIONS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "pool_mixer": ((1, 48, 9, 8), {}),
    "conv_mlp": ((1, 96, 5, 5), {"hidden": 128}),  # in two kernels
    "meta4d": ((1, 16, 9, 9), {"hidden": 16}),
    "conv_norm": ((1, 3, 9, 8), {"outputs": 48, "activation": "relu"}),
    "attention_mixer": ((1, 23, 48), {"num_heads": 2, "key_dim": 32, "value_dim": 64}),
    "head": ((2, 9, 48), {"classes": 400}),
}
SAME_ORDER = ("pool_mixer_kernel", "split_sum_kernel")  # sums as in the source: all bits are equal


@needs_compiler
def test_agreement_with_the_interpreter(tmp_path: Path) -> None:
    """The machine computes what the interpreter does, kernel by kernel, where approximations are exact.

    The two sum in other orders. float16: 99.5 % of the outputs have the same bits, the others differ by 2 ulp at the
    output's scale; so do partial sums of float16 products, once rounded. float32: 4 ulp at that scale.
    """
    torch.manual_seed(0)
    calls = []
    for dtype in (torch.float16, torch.float32):
        for operation, (shape, options) in OPERATIONS.items():
            for capability in (80, 90, 100):
                case = draw_case(operation, shape, dtype, **options)
                if operation == "attention_mixer":  # exponentials amplify the errors of large scores
                    x, *others = case.arguments
                    case = replace(
                        case,
                        arguments=(x, *(one / 4 if one.dtype != dtype or one.ndim != 2 else one for one in others)),
                    )
                with float32_as_such(), stand_in(TARGETS[capability]), recorded() as launches:
                    case.run("triton")
                calls += [Call.of(launch, capability) for launch in launches]
    torch.save(calls, tmp_path / "calls")
    run(str(TESTS / "executed_worker.py"), str(tmp_path / "calls"), str(tmp_path / "results"))
    kernels = set()
    for call, (result, faults) in zip(calls, torch.load(tmp_path / "results"), strict=True):
        name, kernel = f"{call.kernel} {result.dtype} sm_{call.capability}", call.kernel
        kernels.add(kernel)
        assert not faults, name
        if kernel in SAME_ORDER:
            assert torch.equal(result, call.result), name
            continue
        expected = call.result
        if any(isinstance(one, Tensor) and one.dtype == torch.float16 for one in call.arguments.values()):
            result, expected = result.half(), expected.half()
            assert (result == expected).double().mean() >= 0.995, name
        ulp = torch.finfo(result.dtype).eps * 2.0 ** math.floor(math.log2(expected.abs().max()))
        ulps = (result.double() - expected.double()).abs().max() / ulp
        assert ulps <= (2 if result.dtype == torch.float16 else 4), name
    assert len(kernels) == 9


@needs_compiler
@pytest.mark.skipif(not triton.__version__.startswith(("3.6.", "3.7.")), reason="later versions of Triton wait")
def test_a_fault_of_triton(tmp_path: Path) -> None:
    """On sm_100 two products in one step are read after the first (triton-lang/triton#10821); no shipped tile has two."""
    torch.manual_seed(0)
    case = draw_case("conv_norm", (1, 48, 9, 8), torch.float16, outputs=32)
    with stand_in(TARGETS[100]), recorded() as launches:
        case.run("triton")
    (launch,) = launches
    shipped, two = (Call.of(replace(launch, constants=launch.constants | {"DEPTHS": depths}), 100)
                    for depths in (launch.constants["DEPTHS"], (32, 16)))  # fmt: skip
    torch.save([shipped, two], tmp_path / "calls")
    run(str(TESTS / "executed_worker.py"), str(tmp_path / "calls"), str(tmp_path / "results"))
    (result, none), (wrong, faults) = torch.load(tmp_path / "results")
    assert not none
    assert (result - shipped.result).abs().max() < 0.01
    assert (wrong - shipped.result).abs().max() > 0.5
    assert any(fault.startswith("tensor memory: read while a product runs") for fault in faults)
    assert all("conv_norm.py:" in fault for fault in faults)
