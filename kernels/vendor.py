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


def row_products(product: Tensor, weight: Tensor) -> Tensor:
    """Σ grad * (weight · a) over all rows, float32 [outputs], from product = Σ grad aᵀ [outputs, inputs]."""
    return (product.double() * weight).sum(1).float()


def scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """scale [C] * grad [..., C] in `dtype`, divided by `size_of(scale)`, and that number.

    A pass of its own: the kernels' products take it as it lies in memory. Scaled in registers, it would be overwritten
    while Hopper's matrix units still read it (Triton 3.7, seen in the executed PTX). In place of it, a scaled weight
    would be rounded alike for all rows, and the error would not average out.
    """
    size = size_of(scale)
    found = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    torch.mul(grad, scale / size, out=found)
    return found, size


def size_of(scale: Tensor) -> Tensor:
    """A power of two near the root of the largest scale, [1].

    Divided by it, a float16 gradient does not underflow behind a small layer scale, and does not overflow. A power of
    two adds no rounding.
    """
    largest = scale.abs().amax(0, keepdim=True)
    return torch.where(largest > 0, torch.exp2(torch.floor(0.5 * torch.log2(largest))), 1.0)
