"""The kernels as PyTorch operators under torch.compile, torch.export and torch.fx."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from machine import DEVICE, SLACK
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from effformer import EfficientFormer, ops

pytestmark = pytest.mark.usefixtures("kernel_device")


@pytest.fixture
def _no_compiled_code(kernel_device: None) -> None:
    """Nor a default device, with which torch.compile does not trace `Tensor.unflatten`: these tests name theirs."""
    torch._dynamo.reset()
    torch.set_default_device(None)


@pytest.mark.usefixtures("_no_compiled_code")
def test_compile_traces_through_the_operators(narrow: Callable[..., EfficientFormer]) -> None:
    network = narrow(dtype=torch.float32, backend="triton", device=DEVICE)
    eager = narrow(dtype=torch.float32, backend="eager", device=DEVICE)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    with torch.no_grad():
        for batch in (2, 3, 5):
            x = torch.randn(batch, 3, 33, 64, device=DEVICE)
            torch._dynamo.mark_dynamic(x, 0)
            assert torch.allclose(compiled(x), eager(x), rtol=0, atol=SLACK)
    assert counter.frame_count == 1
    called = Counter(str(node.target) for node in counter.graphs[0].graph.nodes)
    assert called["effformer.meta4d.default"] == 5
    assert called["effformer.attention_mixer.default"] == called["effformer.linear_mlp.default"] == 1


@pytest.mark.usefixtures("_no_compiled_code")
@pytest.mark.parametrize("choice", ["eager", "triton"])
def test_compile_under_autocast(narrow: Callable[..., EfficientFormer], choice: str) -> None:
    network = narrow(dtype=torch.float32, backend=choice, depths=(1, 1, 1, 1), device=DEVICE)
    x = torch.randn(1, 3, 33, 64, device=DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.float16):
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x).float(), network(x).float(), rtol=0, atol=1e-2)


@pytest.mark.usefixtures("_no_compiled_code")
def test_inductor_keeps_the_operators_layouts(narrow: Callable[..., EfficientFormer]) -> None:
    network = narrow(dtype=torch.float32, depths=(1, 1, 1, 1), backend="triton", device=DEVICE)
    network = network.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 33, 64, device=DEVICE).to(memory_format=torch.channels_last)
    with torch.no_grad(), torch._inductor.config.patch({"cpp.vec_isa_ok": True}):  # not tried out, which takes seconds
        assert torch.allclose(torch.compile(network, fullgraph=True)(x), network(x), rtol=0, atol=SLACK)


def test_export_traces_the_operators(narrow: Callable[..., EfficientFormer]) -> None:
    network = narrow(dtype=torch.float32, backend="triton")
    batch, height, width = (torch.export.Dim(name, min=low) for name, low in (("b", 1), ("h", 33), ("w", 33)))
    with torch.no_grad():
        program = torch.export.export(
            network, (torch.randn(2, 3, 64, 96),), dynamic_shapes={"x": {0: batch, 2: height, 3: width}}
        )
        for shape in ((3, 3, 64, 96), (1, 3, 97, 50)):
            x = torch.randn(shape)
            assert torch.allclose(program.module()(x), network(x), rtol=0, atol=SLACK)
    assert any(str(node.target) == "effformer.meta4d.default" for node in program.graph.nodes)


def test_a_saved_export_loads_where_the_operators_are_registered(tmp_path: Path) -> None:
    class Pool(torch.nn.Module):
        def forward(self, x: Tensor, layer_scale: Tensor) -> Tensor:
            return ops.pool_mixer(x, layer_scale, backend="triton")

    example = (torch.randn(1, 3, 4, 5), torch.rand(3))
    torch.export.save(torch.export.export(Pool(), example), tmp_path / "pool.pt2")
    code = "import effformer.kernels.operators, sys, torch; print(torch.export.load(sys.argv[1]).graph)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "pool.pt2")], capture_output=True, text=True, check=True
    )
    assert "effformer.pool_mixer.default" in done.stdout


def test_fx_keeps_operations_whole(narrow: Callable[..., EfficientFormer]) -> None:
    network = narrow(dtype=torch.float32, backend="triton")
    traced = torch.fx.symbolic_trace(network)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(traced(x), network(x), rtol=0, atol=SLACK)
