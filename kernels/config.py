"""Which tile sizes a kernel runs with, by operation, shape, dtype and device. Launchers ask here and nowhere else."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """What a configuration depends on: compute capability (90 for 9.0), shared memory of a block in bytes."""

    capability: int
    shared_memory: int

    @property
    def large(self) -> bool:
        """A data-centre GPU from Hopper on: 227 KiB of shared memory, and matrix products of whole warpgroups."""
        return self.shared_memory >= 200_000


AMPERE = Device(80, 166_912)  # A100
HOPPER = Device(90, 232_448)  # H100, H200: what is interpreted where there is no GPU
BLACKWELL = Device(100, 232_448)  # B200


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(10 * properties.major + properties.minor, properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


_stand_in = contextvars.ContextVar("stand_in", default=HOPPER)


@contextlib.contextmanager
def stand_in(device: Device) -> Iterator[None]:
    """Within it, tensors that are on no GPU (interpreted, or meta for compilation) count as being on `device`."""
    token = _stand_in.set(device)
    try:
        yield
    finally:
        _stand_in.reset(token)


def device_of(device: torch.device) -> Device:
    """The configuration's view of a torch device."""
    return _cuda_device(device.index or 0) if device.type == "cuda" else _stand_in.get()


@dataclass(frozen=True)
class MlpConfig:
    """Fused MLP: rows and hidden channels of a tile. `reload`: the residual is read again instead of kept."""

    block_m: int
    block_h: int
    reload: bool
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class LinearConfig:
    """Matrix product: rows, columns (powers of two, side by side) and depth of a tile."""

    block_m: int
    widths: tuple[int, ...]
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AttentionConfig:
    """Attention: queries and keys of a tile. One tile of keys needs no running maximum."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class RowsConfig:
    """Kernels without a matrix product: rows and channels of a tile."""

    block_m: int
    block_c: int
    num_warps: int


def mlp_config(channels: int, dtype: torch.dtype, device: Device) -> MlpConfig | None:
    """The fused MLP's tiles, or None where two matrix products with the hidden in memory are to be taken.

    The accumulator holds all channels of a row: beyond 224 it spills or leaves shared memory.
    """
    if dtype == torch.float32:
        # float32 products are not tensor cores' work: registers bound the tile.
        if channels > 96:
            return None
        block_m = 64 if channels <= 64 else 32
        return MlpConfig(block_m, 32, reload=True, num_warps=block_m // 8, num_stages=1)
    if channels > 224:
        return None
    if device.large:
        if channels <= 48:  # at most 128 registers: two programs a multiprocessor hide each other's loads
            return MlpConfig(128, 64, reload=False, num_warps=8, num_stages=1)
        if channels <= 96:
            return MlpConfig(128, 128 if channels % 32 == 0 else 64, reload=False, num_warps=8, num_stages=2)
        return MlpConfig(128, 64, reload=True, num_warps=8, num_stages=2)
    if channels <= 96:
        return MlpConfig(64, 64, reload=False, num_warps=4, num_stages=2)
    return MlpConfig(64, 32, reload=True, num_warps=4, num_stages=1 if channels > 192 else 2)


def linear_config(outputs: int, inputs: int, dtype: torch.dtype, device: Device) -> LinearConfig:
    """Tiles of a [rows, inputs] x [inputs, outputs] product."""
    if dtype == torch.float32:
        return LinearConfig(64, (_power(outputs, 128),), 64, num_warps=8, num_stages=2)
    block_k = _power(inputs, 64)
    if device.large:
        if outputs % 224 == 0:
            return LinearConfig(128, (128, 64, 32), block_k, num_warps=8, num_stages=3)
        return LinearConfig(128, (_power(outputs, 256),), block_k, num_warps=8, num_stages=3)
    return LinearConfig(128, (_power(outputs, 128),), _power(inputs, 32), num_warps=8, num_stages=3)


def attention_config(tokens: int, key_dim: int, value_dim: int, dtype: torch.dtype, device: Device) -> AttentionConfig:
    """Tiles of queries and keys; `value_dim` is what one program computes of it.

    Raises:
        ValueError: for queries and keys that do not fit on chip.
    """
    widest = max(key_dim, value_dim)
    if 64 * widest * dtype.itemsize > device.shared_memory:
        allowed = device.shared_memory // (64 * dtype.itemsize)
        raise ValueError(f"key_dim: got {key_dim}, allowed are up to {allowed} in {dtype} on this GPU")
    if widest > 256:
        return AttentionConfig(16, 16, num_warps=4, num_stages=1)
    if dtype == torch.float32 or widest > 128:
        block = _power(tokens, 32)
        return AttentionConfig(block, block, num_warps=block // 4, num_stages=1)
    if tokens <= 64:
        block = _power(tokens, 64)
        return AttentionConfig(block, block, num_warps=4, num_stages=1)
    if device.large:
        return AttentionConfig(128, 64, num_warps=8, num_stages=2)
    return AttentionConfig(64, 64, num_warps=4, num_stages=2)


def pool_config(channels: int, *, dense: bool) -> RowsConfig:
    """Tiles of pixels by channels, `dense` where channels lie next to each other, and pixels do not."""
    if not dense:
        return RowsConfig(128, 8, num_warps=4)  # an address for each element: registers bound the tile
    without_waste = max(channels & -channels, 16)  # the largest power of two in it
    block_c = min(without_waste, 64)
    return RowsConfig(2048 // block_c, block_c, num_warps=4)


def norm_config(channels: int) -> RowsConfig:
    """Whole rows, several where they are short.

    Raises:
        ValueError: for rows too long to be kept on chip.
    """
    if channels > 1 << 15:
        raise ValueError(f"x: got {channels} channels, allowed are {1 << 15} for LayerNorm on the kernels")
    block_c = _power(channels, 1 << 15)
    return RowsConfig(max(1, 2048 // block_c), block_c, num_warps=4 if block_c <= 4096 else 8)


def _power(size: int, most: int) -> int:
    """The smallest power of two of 16 or more that holds `size`, or `most`."""
    power = 16
    while power < size and power < most:
        power *= 2
    return power
