"""For tests, ours and those of users who want to know whether their machine computes the same."""

from __future__ import annotations

import torch
from torch import nn

from .blocks import Attention, LayerScale


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every part of `model` that its initial values would hide, in place; returns `model`.

    Layer scales 0.2 to 0.8 (they start at 1e-5: a broken block would hardly move the output), normalisation weights
    0.5 to 1.5 with biases and running statistics to match, bias tables from a normal distribution. Linear and
    convolution weights are drawn so that activations stay near 1. The same seed gives the same values on any device.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(target: torch.Tensor, low: float, high: float) -> None:
        target.copy_(
            torch.empty(target.shape, dtype=torch.float64, device="cpu").uniform_(low, high, generator=generator)
        )

    def normal(target: torch.Tensor, std: float) -> None:
        target.copy_(torch.empty(target.shape, dtype=torch.float64, device="cpu").normal_(0, std, generator=generator))

    for module in model.modules():
        if isinstance(module, LayerScale):
            uniform(module.gamma, 0.2, 0.8)
        elif isinstance(module, Attention):
            normal(module.attention_biases, 1.0)
        elif isinstance(module, nn.PReLU):
            uniform(module.weight, 0.1, 0.4)
        elif isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
            uniform(module.weight, 0.5, 1.5)
            normal(module.bias, 0.2)
            if (
                isinstance(module, nn.BatchNorm2d)
                and module.running_mean is not None
                and module.running_var is not None
            ):
                normal(module.running_mean, 0.2)
                uniform(module.running_var, 0.5, 1.5)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            normal(module.weight, module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                normal(module.bias, 0.2)
    return model
