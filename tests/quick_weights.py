"""Initial weights of layers from a pool of random numbers: networks of the published sizes are made hundreds of times.

Drawing each weight took minutes of all tests. These weights have PyTorch's variance, and are uniform.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_SIZE = 1 << 20  # numbers that one start may be followed by


@functools.cache
def _pool() -> Tensor:
    return torch.rand(2 * _SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _fill(tensor: Tensor, std: float) -> Tensor:
    """Numbers of mean 0; the same ones after the same `torch.manual_seed`."""
    start = int(torch.randint(_SIZE, ()))
    with torch.no_grad():
        flat = tensor.view(-1)
        for first in range(0, flat.numel(), _SIZE):
            piece = flat[first : first + _SIZE]
            piece.copy_(_pool()[start : start + piece.numel()])
        return tensor.mul_(std * math.sqrt(3))


def _is_large(tensor: Tensor) -> bool:
    return type(tensor) is nn.Parameter and tensor.device.type == "cpu" and tensor.numel() > 4096


@contextlib.contextmanager
def quick_weights() -> Iterator[None]:
    """Within it, large layers take their weights from the pool."""
    kaiming, truncated = nn.init.kaiming_uniform_, nn.init.trunc_normal_

    def kaiming_uniform_(tensor: Tensor, a: float = 0, **kwargs: Any) -> Tensor:
        if kwargs or not _is_large(tensor):
            return kaiming(tensor, a, **kwargs)
        return _fill(tensor, math.sqrt(2 / ((1 + a**2) * tensor[0].numel())))

    def trunc_normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0, **kwargs: Any) -> Tensor:
        if kwargs or mean or not _is_large(tensor):
            return truncated(tensor, mean, std, **kwargs)
        return _fill(tensor, std)

    nn.init.kaiming_uniform_, nn.init.trunc_normal_ = kaiming_uniform_, trunc_normal_
    try:
        yield
    finally:
        nn.init.kaiming_uniform_, nn.init.trunc_normal_ = kaiming, truncated
