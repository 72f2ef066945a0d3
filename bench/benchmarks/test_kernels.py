"""pytest-benchmark on the fused operations, whose times are the device's: `pytest bench/benchmarks -k ...`.

A time is the mean over one round of a `Rotation`, or on a CPU that of one call. Names are such as
"meta4d-bfloat16-batch256-48x56x56-ours". `effformer bench kernels` measures the same, and keeps records.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from effformer.bench.measure.ceilings import Measured, measure_ceilings
from effformer.bench.measure.operation_providers import PROVIDERS, Provider
from effformer.bench.measure.operations import cells, copied, exact_of
from effformer.bench.measure.roofline import cost
from effformer.bench.measure.timing import DeviceClock, Rotation

from effformer.apps.verify import DTYPES, OPERATIONS, draw
from effformer.apps.verify_report import Check, describe_dtype, describe_shape
from effformer.config import PRESETS
from effformer.testing import Case, accuracy, float32_as_such

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
BATCHES = (256, 1, 8, 64)
CLOCK = DeviceClock()


def name_of(check: Check) -> str:
    batch, *shape = check.shape
    return f"{check.operation}-{describe_dtype(check.dtype)}-batch{batch}-{describe_shape(shape)}"


@pytest.fixture(scope="session")
def ceilings() -> dict[torch.dtype, Measured]:
    """Of this run, by dtype; filled where one is asked for."""
    return {}


@pytest.mark.benchmark(timer=CLOCK, warmup=False)
@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)
@pytest.mark.parametrize("check", cells(list(PRESETS), OPERATIONS, DTYPES, BATCHES), ids=name_of)
def test_kernel(benchmark: Any, check: Check, provider: Provider, ceilings: dict[torch.dtype, Measured]) -> None:
    if not provider.computes(check.operation):
        pytest.skip(f"{provider.name} does not compute {check.operation}")
    if reason := provider.why_not(DEVICE, check.dtype):
        pytest.skip(reason)
    if check.dtype not in ceilings:
        ceilings[check.dtype] = measure_ceilings(DEVICE, check.dtype)
    flops, traffic = cost(check.operation, check.shape, check.options, check.dtype)
    case = draw(check, DEVICE)
    assert isinstance(case, Case)
    torch.compiler.reset()
    name, form = next(iter(provider.forms(DEVICE).items()))
    with torch.no_grad(), float32_as_such():
        exact = exact_of(case)
        errors = accuracy(form(case)(), exact, case.run("eager"))
        assert errors.misplaced == 0
        rotation = Rotation(lambda: form(copied(case)), DEVICE, int(traffic))
        benchmark.pedantic(CLOCK.run, (rotation,), rounds=20, warmup_rounds=2)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "form": name,
        "GB/s": traffic / seconds / 1e9,
        "TFLOP/s": flops / seconds / 1e12 if flops else None,
        "roofline": ceilings[check.dtype].ceilings.floor(flops, traffic) / seconds,
        "max error": errors.max_error / exact.abs().max().item(),
        "within the rule": errors.passes(),
    }
