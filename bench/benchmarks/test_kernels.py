"""pytest-benchmark on the fused operations: `pytest bench/benchmarks -k ...`.

The cases, the checks and the timer are those of `effformer bench kernels`, which keeps records. pytest-benchmark gets
three rounds: the 20th, 50th and 80th percentile. Names are such as "meta4d-bfloat16-batch256-48x56x56-ours".
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from effformer.bench.measure.ceilings import measure_ceilings
from effformer.bench.measure.operation_providers import PROVIDERS, OperationProvider
from effformer.bench.measure.operations import Operation, begun, in_order
from effformer.bench.measure.records import machine_of
from effformer.bench.measure.roofline import Ceilings
from effformer.bench.measure.timing import device_time

from effformer.apps.verify_report import Check, describe_dtype, describe_shape
from effformer.backend import TRITON_DTYPES
from effformer.config import PRESETS
from effformer.testing import float32_as_such
from effformer.workload import OPERATIONS

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


CLOCK = [0.0]  # the times so far, of which a clock shows the sum


@functools.cache
def ceilings(dtype: torch.dtype) -> Ceilings:
    return measure_ceilings(DEVICE, dtype).ceilings


def name_of(check: Check) -> str:
    batch, *shape = check.shape
    return f"{check.operation}-{describe_dtype(check.dtype)}-batch{batch}-{describe_shape(shape)}"


@pytest.mark.benchmark(timer=lambda: sum(CLOCK), warmup=False)
@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)
@pytest.mark.parametrize("check", in_order(list(PRESETS), OPERATIONS, TRITON_DTYPES, (256, 1, 8, 64)), ids=name_of)
def test_kernel(benchmark: Any, check: Check, provider: OperationProvider) -> None:
    if not provider.computes(check.operation):
        pytest.skip(f"{provider.name} does not compute {check.operation}")
    if reason := provider.why_not(DEVICE, check.dtype):
        pytest.skip(reason)
    with torch.no_grad(), float32_as_such():
        operation = Operation.of(check, DEVICE, ceilings(check.dtype), device_time)
        found = {r.metric: r for r in operation.measure(provider, begun(check, provider.name, machine_of(DEVICE)))}
    times = [ms / 1e3 for ms in (found["ms"].p20, found["ms"].p50, found["ms"].p80) if ms is not None]
    benchmark.pedantic(CLOCK.append, setup=lambda: ((times.pop(),), {}), rounds=len(times))
    benchmark.extra_info |= {metric: record.p50 for metric, record in found.items()}
    benchmark.extra_info |= {"roofline": found["ms"].roofline, **found["ms"].details}
