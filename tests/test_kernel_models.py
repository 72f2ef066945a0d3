"""Whole networks and full-size blocks on the kernels, against float64 and beside eager's own error."""

from __future__ import annotations

import pytest
import torch
from machine import DEVICE, DTYPES, INTERPRETED, ON_GPU, id_of, measured

from effformer import EfficientFormer, EfficientFormerConfig, create_model, list_models, set_backend
from effformer.model.blocks import Meta3D
from effformer.model.meta4d import Meta4D
from effformer.testing import Accuracy, accuracy, draw_map, randomise

pytestmark = pytest.mark.usefixtures("kernel_device", "many_rows")


def errors(model: torch.nn.Module, dtype: torch.dtype, *inputs: object) -> Accuracy:
    """Errors of the kernels and of eager PyTorch, both in `dtype`, against float64 on the same rounded weights."""

    def call(in_dtype: torch.dtype, backend: str) -> torch.Tensor:
        model.to(in_dtype)
        for block in model.modules():
            if hasattr(block, "backend"):
                block.backend = backend
        return model(*(x.to(in_dtype) if isinstance(x, torch.Tensor) else x for x in inputs))

    model.to(dtype)
    with torch.no_grad():
        triton, eager = call(dtype, "triton"), call(dtype, "eager")
        exact = call(torch.float64, "eager")
    assert exact.std() > 0.1
    found = accuracy(triton, exact, eager)
    measured(type(model).__name__, triton, found)
    return found


def check(found: Accuracy, mean: float = 1.5) -> None:
    """The accuracy rule, interpreted without its 2 ulp and with `mean` in place of its 1.5."""
    assert found.passes(0.0 if INTERPRETED else 2.0), found
    assert found.mean_error <= mean * found.eager_mean_error or not INTERPRETED, found


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, id=f"{name}-{id_of(dtype)}")
        for name in list_models()
        for dtype in DTYPES
        # Interpreted, the large ones run once each: operations at their widths are in test_kernels.py, in both dtypes.
        if ON_GPU or (name, dtype) not in (("efficientformer_l3", torch.float32), ("efficientformer_l7", torch.float16))
    ],
)
def test_whole_network(name: str, dtype: torch.dtype) -> None:
    """96x64 pixels: maps of 24x16 to 3x2, and 6 tokens."""
    # Interpreted, L7 is a block of each kind a stage: its kernels are the same in all of a stage's.
    fewer = {"depths": (1, 1, 1, 2), "num_vit": 1} if INTERPRETED and name == "efficientformer_l7" else {}
    network = randomise(create_model(name, **fewer), seed=1).eval().to(memory_format=torch.channels_last)
    check(errors(network, dtype, draw_map((1, 3, 96, 64), dtype)))


L1 = EfficientFormerConfig(depths=(3, 2, 6, 4), widths=(48, 96, 224, 448), num_vit=1)


@pytest.mark.parametrize(("width", "side"), [(48, 56), (96, 28), (224, 14), (448, 7)])
def test_full_size_4d_blocks(width: int, side: int) -> None:
    """The stages of L1 at 224x224."""
    block = randomise(Meta4D(width, L1, 0.0, 1e-5, "triton")).eval()
    check(errors(block, torch.float16, draw_map((1, width, side, side), torch.float16)), mean=1.0)


@pytest.mark.parametrize(("height", "width"), [(7, 7), (16, 20)])
def test_full_size_3d_blocks(height: int, width: int) -> None:
    """L1's at 224x224 and at 512x640."""
    block = randomise(Meta3D(448, L1, 0.0, 1e-5, "triton")).eval()
    x = torch.randn(1, height * width, 448).half()
    check(errors(block, torch.float16, x, height, width), mean=1.0)


def test_both_memory_formats_give_the_same(narrow: object) -> None:
    network: EfficientFormer = narrow(dtype=torch.float32)  # type: ignore[operator]
    slack = 1e-6 if DEVICE.type == "cpu" else 1e-4  # cuDNN convolves each format by another algorithm
    set_backend(network, "triton")
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert torch.allclose(network(x), network(x.to(memory_format=torch.channels_last)), rtol=0, atol=slack)
