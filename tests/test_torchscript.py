"""`torch.jit.trace`, and `torch.onnx.export` by its TorchScript exporter: both take networks as they take timm's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import small
from torch import Tensor, nn


class Maps(nn.Module):
    """The feature maps of a network, as a detector uses them."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        found: list[Tensor] = self.network.forward_intermediates(images, intermediates_only=True)
        return found


def assert_same(found: list[Any], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(one), other, rtol=0, atol=1e-5 * other.abs().max().item())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("settings", "maps", "free"),
    [
        ({}, False, False),
        ({"bias_resize": "matrix-bicubic", "feature_norm": "tap", "act": "prelu"}, True, True),
        ({"bias_resize": "matrix-bilinear", "feature_norm": "inline"}, True, False),
        ({"table_resolution": 9}, False, True),
    ],
    ids=["logits", "maps of any size", "maps", "logits of any size"],
)
@torch.no_grad()
def test_onnx_by_torchscript(tmp_path: Path, settings: dict[str, Any], maps: bool, free: bool) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    network = Maps(small(**settings)).eval() if maps else small(**settings)
    axes = {0: "batch"} | ({2: "height", 3: "width"} if free else {})
    path = tmp_path / "network.onnx"
    torch.onnx.export(
        network, (torch.randn(2, 3, 64, 96),), path, input_names=["images"], dynamic_axes={"images": axes}, dynamo=False
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in [(3, 3, 64, 96), *([(1, 3, 128, 64)] if free else [])]:
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        expected = network(images)
        assert_same(session.run(None, {"images": images.numpy()}), expected if maps else [expected])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_a_trace_takes_other_batches_and_sizes() -> None:
    network = small()
    traced = torch.jit.trace(network, torch.randn(2, 3, 64, 96))
    images = torch.randn(3, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    assert_same([traced(images)], [network(images)])
