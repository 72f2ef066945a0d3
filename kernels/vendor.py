"""Matrix products of the vendor's library between the kernels of a backward, and the gradients that they take."""

from __future__ import annotations

import torch
from torch import Tensor


def flat_map(x: Tensor) -> Tensor:
    """The rows [rows, C] of a map [B, C, H, W]; a view where they lie in one line."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """a · b in float32, for the gradient of a weight: a sum over all rows."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """scale [C] * grad [..., C] in `dtype`, divided by a number [1].

    A power of two near the root of the largest scale: it keeps a float16 gradient from underflow behind a small layer
    scale, and from overflow, and adds no rounding.

    A pass of its own: the kernels' products take it as it lies in memory. Scaled in registers, it would be overwritten
    while Hopper's matrix units still read it (Triton 3.7, seen in the executed PTX). In place of it, a scaled weight
    would be rounded alike for all rows, and the error would not average out.
    """
    size = scale.abs().amax(0, keepdim=True)
    size = torch.where(size > 0, torch.exp2(torch.floor(0.5 * torch.log2(size))), 1.0)
    found = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    torch.mul(grad, scale / size, out=found)
    return found, size
