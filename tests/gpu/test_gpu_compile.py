"""torch.compile with Inductor, whole L1, beside the live network; with CUDA graphs, too."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import MODELS, network
from machine import ON_GPU, REHEARSED, measured
from torch._dynamo.utils import counters

from effformer import set_backend
from effformer.testing import accuracy, draw_map

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernel_device")]
SHAPE = (2, 3, 64, 96) if REHEARSED else (8, 3, 224, 224)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@torch.no_grad()
def test_inductor(mode: str) -> None:
    dtype = torch.float32 if REHEARSED else torch.bfloat16
    model = network(MODELS[0], dtype, "triton").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = [draw_map(SHAPE, dtype) for _ in range(4)]
    live = [model(x) for x in images]
    torch.set_default_device(None)  # with one, torch.compile does not trace `Tensor.unflatten`
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    results = []
    for x in images:
        torch.compiler.cudagraph_mark_step_begin()
        results.append(compiled(x).clone())
    if ON_GPU and mode == "reduce-overhead":
        assert counters["inductor"]["cudagraph_skips"] == 0, dict(counters["inductor"])
    set_backend(model, "eager")
    eager = [model(x) for x in images]
    model.double()
    for x, result, its_live, its_eager in zip(images, results, live, eager, strict=True):
        exact = model(x.double())
        found, own = accuracy(result, exact, its_eager), accuracy(its_live, exact, its_eager)
        measured(f"network, Inductor {mode}", result, found)
        measured("network, live", result, own)
        assert found.passes(), found
