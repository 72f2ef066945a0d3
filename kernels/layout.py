"""How tensors lie in memory: the description that kernels get, and the layout of their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch import Launch, run
from .limits import beyond_map


@dataclass(frozen=True)
class Rows:
    """A map [B, C, H, W] or tokens [B, N, C] as rows of channels that lie next to each other; tokens have H = 1, W = N.

    Row (b, h, w) starts at b * stride_b + h * stride_h + w * stride_w (in elements).
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

    @property
    def count(self) -> int:
        return self.batch * self.height * self.width

    @property
    def sizes(self) -> dict[str, Tensor | int | float | None]:
        """Arguments rows, H, W of a kernel."""
        return {"rows": self.count, "H": self.height, "W": self.width}

    def pointer(self, name: str) -> dict[str, Tensor | int | float | None]:
        """Arguments <name>_ptr and, by the name's first letter, stride_<n>b, h, w of a kernel."""
        strides = {"b": self.stride_b, "h": self.stride_h, "w": self.stride_w}
        return {f"{name}_ptr": self.tensor, **{f"stride_{name[0]}{axis}": size for axis, size in strides.items()}}

    @property
    def flat(self) -> bool:
        rows = self.height == 1 or self.stride_h == self.width * self.stride_w
        return rows and (self.batch == 1 or self.stride_b == self.height * self.width * self.stride_w)


class Mlp(NamedTuple):
    """The MLP x -> scale2 * (weight2 · act(scale1 * (weight1 · x) + shift1)) + shift2.

    weight1 [hidden, C] and weight2 [C, hidden] in the products' dtype; scales and shifts [hidden] and [C] in float32;
    all contiguous.
    Without `deterministic`, programs that share out the hidden channels add in any order.
    """

    weight1: Tensor
    scale1: Tensor | None
    shift1: Tensor
    weight2: Tensor
    scale2: Tensor
    shift2: Tensor
    activation: str
    deterministic: bool = True


def map_rows(x: Tensor) -> Rows:
    """Rows of a map [B, C, H, W] (whose channels lie apart: rows that start where these do)."""
    (batch, channels, height, width), strides = x.shape, x.stride()
    if reason := beyond_map(height, width):
        raise ValueError(reason)
    return Rows(x, batch, height, width, channels, _stride(batch, strides[0]), strides[2], strides[3])


def token_rows(x: Tensor) -> Rows:
    """Rows of tokens [B, N, C]."""
    (batch, tokens, channels), strides = x.shape, x.stride()
    return Rows(x, batch, 1, tokens, channels, _stride(batch, strides[0]), 0, strides[1])


def _stride(batch: int, stride: int) -> int:
    """From image to image; of one alone it is of no use, and kernels would be compiled anew for some."""
    return stride if batch > 1 else 0


def new_rows(like: Rows, channels: int, dtype: torch.dtype) -> Rows:
    """Empty flat rows over the same images, lines and columns."""
    shape = (like.batch, like.height, like.width, channels)
    tensor = torch.empty(shape, dtype=dtype, device=like.tensor.device)
    return Rows(tensor, *shape, *tensor.stride()[:3])


def dense_map(x: Tensor) -> Tensor:
    """The map x [B, C, H, W], copied once if its channels do not lie next to each other.

    A matrix product that gathers its channels from all over the map is worse than a copy: the compiler keeps an address
    for each element, and spills them by the hundred.
    """
    return x if _together(x) else x.contiguous(memory_format=torch.channels_last)


def _together(x: Tensor) -> bool:
    return x.stride(1) == 1 or x.shape[1] == 1


def dense_tokens(x: Tensor) -> Tensor:
    """The tokens x [B, N, C], copied once if their channels do not lie next to each other."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


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


def filled_map(x: Tensor, launches: Callable[[Tensor, Tensor], list[Launch]]) -> Tensor:
    """The output that `launches(dense x, dense out)` write, in the layout of `new_map(x)`."""
    out, source = new_map(x), dense_map(x)
    target = out if _together(out) else new_map(source)
    run(*launches(source, target))
    return out if target is out else out.copy_(target)


def new_tokens(x: Tensor, channels: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """An empty contiguous [B, N, channels] for tokens x [B, N, C]; `channels` and `dtype` are x's by default."""
    shape = (x.shape[0], x.shape[1], x.shape[2] if channels is None else channels)
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)


def packed(*arguments: Any) -> Iterator[Any]:
    """An operator's arguments with weights and vectors as the kernels read them, contiguous: copied if they are not."""
    return (a.contiguous() if isinstance(a, Tensor) else a for a in arguments)
