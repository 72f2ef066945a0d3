"""The sizes that the kernels do not compute. `effformer.ops` takes eager PyTorch there under "auto"."""

from __future__ import annotations

import torch

from .tiling.device import Device, device_of

MOST_PIXELS = 2**31 - 4096  # of an image: kernels count them in 32 bits, images and elements in 64
MOST_CHANNELS = 1 << 15  # of LayerNorm: a program keeps a whole row on chip
_LEAST_TILE = 64  # rows of queries and keys that attention keeps in shared memory


def beyond_map(height: int, width: int) -> str | None:
    """The error for a map of too many pixels; None for others."""
    if height * width > MOST_PIXELS:
        return f"x: got a map of {height}x{width}, allowed are {MOST_PIXELS} pixels an image"
    return None


def beyond_norm(channels: int) -> str | None:
    """The error for tokens of too many channels; None for others."""
    if channels > MOST_CHANNELS:
        return f"x: got {channels} channels, allowed are {MOST_CHANNELS} for LayerNorm on the kernels"
    return None


def beyond_attention(key_dim: int, dtype: torch.dtype, device: torch.device | Device) -> str | None:
    """The error for queries and keys that do not fit on chip; None for others."""
    known = device if isinstance(device, Device) else device_of(device)
    most = known.shared_memory // (_LEAST_TILE * dtype.itemsize)
    return f"key_dim: got {key_dim}, allowed are up to {most} in {dtype} on this GPU" if key_dim > most else None


# Compilers take the answer and do not trace the function, which asks for the GPU's properties.
beyond_attention._dynamo_marked_constant = True  # type: ignore[attr-defined]
