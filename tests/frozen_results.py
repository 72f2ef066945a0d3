"""Helpers for tests of frozen networks: pixels and their mean, the live network's results, a comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from effformer import EfficientFormer

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def live(model: EfficientFormer, output: str, x: Tensor) -> list[Tensor]:
    """The live model's result for an output."""
    with torch.no_grad():
        match output:
            case "logits":
                return [model(x)]
            case "pooled":
                return [model.forward_head(model.forward_features(x), pre_logits=True)]
            case _:
                return model.forward_intermediates(x, intermediates_only=True)


def listed(result: Tensor | list[Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else result


def close(found: Tensor | list[Tensor], expected: Tensor | list[Tensor], relative: float = 1e-12) -> None:
    found, expected = listed(found), listed(expected)
    assert [f.shape for f in found] == [e.shape for e in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= relative * other.abs().max()


def normalised(pixels: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """uint8 [B, C, H, W] -> images for the live network."""
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    return ((pixels.double() / 255 - mean) / std).to(dtype)
