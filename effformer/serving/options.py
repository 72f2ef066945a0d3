"""The choices that a model is frozen with, the checks of its images, and the kinds of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..backend import refuse_triton, why_not_triton
from ..checks import shape_of
from ..model.adapter import Adapter, AdapterSpec
from ..model.network import EfficientFormer
from ..model.wrappers import refusal

Output = Literal["logits", "pooled", "features"]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Options:
    """Arguments of `freeze`, checked; copies of a frozen model resolve them again, perhaps on another device.

    Attributes:
        output: as asked for; None for the model's own.
        pixels: mean and std; None without.
        max_graphs: 0 where graphs are off.
        pads: whether batches are padded when no more graphs may be captured.
    """

    dtype: torch.dtype
    output: Output | None
    pixels: tuple[Sequence[float], Sequence[float]] | None
    max_graphs: int
    pads: bool
    new_outputs: bool
    deterministic: bool
    backend: str

    def why_eager(self, device: torch.device, act: str) -> str | None:
        """The reason why the backend is "eager" on this device, for this activation; None where it is "triton".

        Raises:
            UnsupportedError: for backend="triton" where the kernels cannot run.
        """
        if self.backend == "eager":
            return "asked for"
        reason = why_not_triton(device, self.dtype, act, self.backend == "triton")
        refuse_triton(self.backend, reason)
        return reason

    def check_images(self, images: Tensor, in_chans: int, device: torch.device) -> Tensor:
        """Check images of a frozen model on `device`, and return them as [B, in_chans, H, W]."""
        if not isinstance(images, Tensor):
            raise TypeError(f"images: got {type(images).__name__}, allowed is a torch.Tensor")
        uint8 = images.dtype == torch.uint8
        if uint8 and self.pixels is None:
            raise TypeError("images: got torch.uint8, allowed for uint8 is a model frozen with mean and std")
        if not uint8 and images.dtype != self.dtype:
            also = " and torch.uint8" if self.pixels else ""
            raise TypeError(f"images: got {images.dtype}, allowed is {self.dtype}{also}")
        if images.device != device:
            raise ValueError(f"images: got a tensor on {images.device}, allowed is {device}")
        if torch.is_grad_enabled() and images.requires_grad:
            raise ValueError("images: got a tensor that requires a gradient, and a frozen model has none")
        first = images.ndim == 4 and images.shape[1] == in_chans
        last = uint8 and images.ndim == 4 and images.shape[3] == in_chans
        allowed = f"[B, {in_chans}, H, W]" + (f" or [B, H, W, {in_chans}]" if uint8 else "")
        if not first and not last:
            raise ValueError(f"images: got shape {shape_of(images)}, allowed is {allowed}")
        if first and last:
            raise ValueError(f"images: got shape {shape_of(images)}, which may be either of {allowed}")
        images = images if first else images.permute(0, 3, 1, 2)
        images = images.resolve_neg() if images.is_neg() else images
        if images.shape[2] == 0 or images.shape[3] == 0:
            raise ValueError(f"images: got shape {shape_of(images)}, allowed are sides of 1 or more")
        return images


def described(model: EfficientFormer | Adapter, dtype: torch.dtype, output: Output | None) -> AdapterSpec:
    """The network of `model`, and the form of its results; `output` asks for those of the network itself."""
    if isinstance(model, EfficientFormer):
        return AdapterSpec(model, output or "logits", _as_it_is)
    if not hasattr(type(model), "describe_for_freeze"):  # wrappers hand on attributes of the model within
        raise refusal(model, (EfficientFormer, Adapter), "an EfficientFormer or a Backbone of effformer")
    found = model.describe_for_freeze(dtype)
    if output is None:
        return found
    return AdapterSpec(found.network, output, _as_it_is)


def _as_it_is(result: Any) -> Any:
    return result


def kind_of(model: object, spec: AdapterSpec) -> tuple[Any, ...]:
    """Its class, and the shapes of its modules after the network; all networks are of one kind."""
    shapes = {} if spec.copied is None else {name: one.shape for name, one in spec.copied.state_dict().items()}
    return EfficientFormer if isinstance(model, EfficientFormer) else type(model), spec.output, shapes
