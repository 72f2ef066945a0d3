"""How tensors lie in memory: what the kernels are told of it, and what their outputs get."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """A map [B, C, H, W] or tokens [B, N, C] as rows of channels, H = 1 and W = N for tokens.

    The channels of row (b, h, w) start at b * stride_b + h * stride_h + w * stride_w, `stride_c` apart (in elements).
    `flat`: row r, counted over all three, starts at r * stride_w.
    """

    tensor: Tensor
    batch: int
    height: int
    width: int
    channels: int
    stride_b: int
    stride_h: int
    stride_w: int
    stride_c: int

    @property
    def count(self) -> int:
        return self.batch * self.height * self.width

    def strides(self, name: str) -> dict[str, Tensor | int | float | None]:
        """Arguments stride_<name>b, h, w, c of a kernel."""
        return {
            f"stride_{name}b": self.stride_b,
            f"stride_{name}h": self.stride_h,
            f"stride_{name}w": self.stride_w,
            f"stride_{name}c": self.stride_c,
        }

    @property
    def flat(self) -> bool:
        rows = self.height == 1 or self.stride_h == self.width * self.stride_w
        return rows and (self.batch == 1 or self.stride_b == self.height * self.width * self.stride_w)


def map_rows(x: Tensor) -> Rows:
    """Rows of a map [B, C, H, W], whatever its strides."""
    (batch, channels, height, width), strides = x.shape, x.stride()
    return Rows(x, batch, height, width, channels, strides[0], strides[2], strides[3], strides[1])


def token_rows(x: Tensor) -> Rows:
    """Rows of tokens [B, N, C], whatever their strides."""
    (batch, tokens, channels), strides = x.shape, x.stride()
    return Rows(x, batch, 1, tokens, channels, strides[0], 0, strides[1], strides[2])


def new_rows(like: Rows, channels: int, dtype: torch.dtype) -> Rows:
    """Empty flat rows over the same images, lines and columns."""
    shape = (like.batch, like.height, like.width, channels)
    tensor = torch.empty(shape, dtype=dtype, device=like.tensor.device)
    return Rows(tensor, *shape, *tensor.stride())


def new_map(x: Tensor) -> Tensor:
    """An empty tensor like the map x [B, C, H, W], densely packed, in x's memory format.

    Implementations and their fakes both allocate with it. Channels that lie next to each other mean channels_last,
    anything else contiguous; so do slices and expanded tensors, whose own strides would be no packed layout.
    """
    channels_last = x.stride(1) == 1 and not x.is_contiguous()
    return torch.empty(
        x.shape,
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def new_tokens(x: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """An empty contiguous [B, N, channels] for tokens x [B, N, ...]."""
    return torch.empty((x.shape[0], x.shape[1], channels), dtype=dtype or x.dtype, device=x.device)


def packed(*arguments: Any) -> Iterator[Any]:
    """An operator's arguments with weights and vectors as the kernels read them, contiguous: copied if they are not."""
    return (a.contiguous() if isinstance(a, Tensor) else a for a in arguments)
