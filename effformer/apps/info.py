"""Facts about the models and this machine, as `effformer info` prints them."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata

import torch

from ..factory import create_model
from ..ops import why_not_triton
from ..version import __version__


@dataclass(frozen=True)
class ModelSummary:
    """Parameters, multiply-accumulates of one image, and (channels, height, width) of the four feature maps."""

    name: str
    parameters: int
    macs: int
    features: tuple[tuple[int, int, int], ...]


def summarise(name: str, height: int = 224, width: int = 224) -> ModelSummary:
    """Summarise a published model with 1000 classes, without allocating it.

    MACs count convolutions and matrix products, but not normalisation, activation and pooling.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    model = create_model(name, device="meta").eval()
    image = torch.empty(1, 3, height, width, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    maps = model.forward_intermediates(image, intermediates_only=True)
    return ModelSummary(
        name=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=counter.get_total_flops() // 2,
        features=tuple((m.shape[1], m.shape[2], m.shape[3]) for m in maps),
    )


def versions() -> dict[str, str]:
    """Versions of effformer and its dependencies; Triton is not imported for its own."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "not installed"
    return {
        "effformer": __version__,
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda or "none (a CPU build of torch)",
        "python": platform.python_version(),
    }


def devices() -> dict[str, str]:
    """Each device that torch can use here, with a description."""
    found = {"cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
    return found


def why_no_gpu() -> str:
    """Why torch finds no GPU here."""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} was built without CUDA"
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"torch finds no GPU; CUDA_VISIBLE_DEVICES is {visible!r}"
    return "torch finds no GPU; nvidia-smi shows whether the driver does"


def describe_backend(backend: str, device: torch.device) -> str:
    """The implementation that `backend` takes on `device`, and why."""
    if backend != "auto":
        return f"{backend} (asked for)"
    reason = why_not_triton(device)
    return f'eager ("auto": {reason})' if reason else 'triton ("auto")'
