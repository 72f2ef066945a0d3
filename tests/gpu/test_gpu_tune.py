"""The search for tiles on the GPU: real times, real compilers beside it, and the outcome read by another process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from effformer.bench.measure.timing import kernel_time
from effformer.bench.offline.candidates import candidates
from effformer.bench.offline.tune import State, tune
from effformer.kernels.tiling import choose as config
from effformer.kernels.tiling.device import Device, device_of
from machine import DEVICE, ON_GPU

from effformer.apps.verify import checks

pytestmark = pytest.mark.gpu


def test_a_few_candidates(tmp_path: Path) -> None:
    """One operation at a time, its first eight candidates each; at a second call nothing is left to do."""
    device = torch.device(DEVICE.type, 0) if ON_GPU else DEVICE
    batch, size = (64, (224, 224)) if ON_GPU else (1, (32, 32))
    dtypes = [torch.bfloat16, torch.float32] if ON_GPU else [torch.float16]
    todo = checks(["efficientformer_l1"], ["meta4d", "linear_mlp"], dtypes, size=size, batch_size=batch)
    todo = todo if ON_GPU else todo[:1]
    state = State(tmp_path / "state.jsonl", device_of(device))

    timer = kernel_time if ON_GPU else lambda *_: 1.0  # an interpreter's time is long, and says nothing

    def search(seconds: float) -> list[object]:
        return list(tune(todo, device, state, seconds=seconds, workers=4 if ON_GPU else 1, timer=timer, propose=few))

    def few(question: config.Question, device: Device) -> list[object]:
        return list(candidates(question, device))[:8] if ON_GPU else []

    found = search(240)
    assert None not in found
    assert {tuned.question[0] for tuned in found} >= ({"meta4d", "linear", "layer_norm"} if ON_GPU else {"meta4d"})
    for tuned in found:
        assert tuned.fault is None, tuned
        assert tuned.ms is not None, tuned
        assert 1e-4 < tuned.ms <= tuned.own_ms < 1e4, tuned
    assert search(60) == []
    assert State(state.path, device_of(device)).tuned == state.tuned


@pytest.mark.cuda
def test_kernel_time_is_that_of_the_device() -> None:
    """A copy of 2 GiB runs at the memory's speed; an empty launch takes microseconds; twice the work takes twice the time."""
    x = torch.empty(2**30, dtype=torch.int8, device=DEVICE)
    y = torch.empty_like(x)
    once = kernel_time(lambda: y.copy_(x), DEVICE)
    twice = kernel_time(lambda: (y.copy_(x), x.copy_(y)), DEVICE)
    assert 2 * x.numel() / 1e13 < once / 1e3 < 2 * x.numel() / 5e10  # 50 GB/s to 10 TB/s
    assert 1.7 < twice / once < 2.3
    small = torch.zeros(16, device=DEVICE)
    assert kernel_time(lambda: small.add_(1), DEVICE) < 0.1
