"""AOTInductor packages on the GPU: of the kernels, where the file loads and where it does not; of eager PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_cases import MODELS, network
from machine import DEVICE, REHEARSED

import effformer
from effformer.testing import accuracy, draw_map

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernel_device")]
SIZE = (33, 64) if REHEARSED else (224, 224)

RUN = """
import sys, torch
path, *imported = sys.argv[1:]
for module in imported:
    __import__(module)
run = torch._inductor.aoti_load_package(path)
torch.save(run(torch.load(path + ".images")), path + ".result")
"""


def run_alone(path: Path, images: torch.Tensor, *imported: str) -> subprocess.CompletedProcess[str]:
    """In a process that imports torch and these modules."""
    torch.save(images, f"{path}.images")
    command = [sys.executable, "-P", "-c", RUN, str(path), *imported]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("backend", ["triton", pytest.param("eager", marks=pytest.mark.cuda)])
@torch.no_grad()
def test_package(backend: str, tmp_path: Path) -> None:
    """`export` itself compares what it loads again with float64; here that is done for other processes."""
    dtype, path = torch.float32 if REHEARSED else torch.bfloat16, tmp_path / "l1.pt2"
    model = network(MODELS[0], dtype, "eager")
    images = draw_map((2, 3, *SIZE), dtype, "contiguous").to(DEVICE)
    torch.set_default_device(None)
    written = effformer.export(model, path, "aoti", size=SIZE, backend=backend)  # type: ignore[arg-type]
    alone = run_alone(path, images)
    if backend == "triton":
        assert "only where effformer.kernels.operators was imported" in written.needs
        assert alone.returncode != 0, "kernels that load by themselves: export may say so"
        assert "Could not find schema for effformer::conv_norm" in alone.stderr
        alone = run_alone(path, images, "effformer.kernels.operators")
    assert alone.returncode == 0, alone.stderr[-2000:]
    eager = model(images)
    found = accuracy(torch.load(f"{path}.result"), model.double()(images.double()), eager)
    assert found.passes(), found
