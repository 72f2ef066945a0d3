"""The benchmark of the operations on the GPU: its clock, and every provider."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from effformer.bench.measure.ceilings import measure_ceilings
from effformer.bench.measure.operation_providers import OURS
from effformer.bench.measure.operations import in_order, measure_operations
from effformer.bench.measure.records import machine_of
from effformer.bench.measure.resume import ResultsFile, failures
from effformer.bench.measure.timing import cache_size, device_time
from machine import DEVICE

pytestmark = [pytest.mark.gpu, pytest.mark.cuda]


def copies(elements: int, times: int = 1) -> Callable[[], Callable[[], object]]:
    def make() -> Callable[[], object]:
        x = torch.empty(elements, dtype=torch.int8, device=DEVICE)
        y = torch.empty_like(x)
        return lambda: [y.copy_(x) for _ in range(times)]

    return make


def test_device_time() -> None:
    """A copy runs at the memory's speed; twice the work takes twice the time; an empty launch takes microseconds."""
    size = 2**28
    once, twice = (device_time(copies(size, times), DEVICE, 2 * size).p50 for times in (1, 2))
    assert 2 * size / 1e13 < once / 1e3 < 2 * size / 5e10  # 50 GB/s to 10 TB/s
    assert 1.7 < twice / once < 2.3
    found = device_time(copies(16), DEVICE, cache_size(DEVICE) // 100)
    assert found.p20 <= found.p50 <= found.p80 <= found.p99
    assert found.p50 < 0.02


def test_nothing_is_found_in_the_cache() -> None:
    """A copy of a tenth of L2 comes from memory: no faster than a large one, but for a launch's share."""
    size = cache_size(DEVICE) // 20
    bandwidth = measure_ceilings(DEVICE, torch.bfloat16).ceilings.bandwidth
    assert device_time(copies(size), DEVICE, 2 * size).p50 / 1e3 > 0.8 * 2 * size / bandwidth


@pytest.mark.parametrize("operation", ["bias_attention", "meta4d", "linear_mlp"])
def test_all_providers(operation: str, tmp_path: Path) -> None:
    device = torch.device(DEVICE.type, 0)
    todo = in_order(["efficientformer_l1"], [operation], [torch.bfloat16], [8])[:1]
    (records,) = measure_operations(todo, ResultsFile(tmp_path / "kernels.jsonl", machine_of(device)), device)
    assert failures(records) == []
    missing = {record.provider: record.why for record in records if record.metric == "not run"}
    assert missing.keys() <= {"FlexAttention"}, missing  # which depends on PyTorch's version
    for record in records:
        if record.metric == "ms":
            assert 0 < record.roofline < 1.1, record  # type: ignore[operator]
        if record.provider == OURS and record.metric == "ms":
            assert record.details["kernels"]
