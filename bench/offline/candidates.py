"""The configurations that the tuner tries."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from ...kernels.tiling.choose import Question
from ...kernels.tiling.device import Device, device_class
from ...kernels.tiling.table import (
    AttentionConfig,
    Config,
    HeadConfig,
    LinearConfig,
    MlpConfig,
    NormConfig,
    PoolConfig,
    SplitConfig,
)

FEW_ROWS = 4096  # with more, a split MLP loses more on reading and writing its parts than it gains


def candidates(question: Question, device: Device) -> Iterator[Config | None]:
    """The configurations worth compiling for a question on `device`, a hundred at most.

    Compiling excluded some: 128 rows by 4 warps spill, and a single tile needs no pipeline. Tiles that are too large
    for the GPU are left to the audit.
    """
    return (use for use in _all(question) if not miscompiled(use, device_class(device)))


def miscompiled(use: Config | None, device: str) -> bool:
    """Whether ptxas 12.8.93, of Triton 3.6.0, gives wrong code: MLP tiles of 64 rows by 8 warps (bench/NOTES.md, 2)."""
    return device == "sm_90" and isinstance(use, MlpConfig | SplitConfig) and (use.block_m, use.num_warps) == (64, 8)


def _all(question: Question) -> Iterator[Config | None]:
    operation, dtype, sizes = question
    match operation:
        case "meta4d" | "conv_mlp" | "linear_mlp":
            yield None
            if sizes[1] <= FEW_ROWS and dtype != torch.float32:
                yield from _splits(sizes[0])
            if operation == "linear_mlp":
                return
            rows = [(64, 4), (64, 8), (128, 8)] if dtype != torch.float32 else [(32, 4), (32, 8), (64, 8)]
            hidden = (32, 64, 128) if dtype != torch.float32 else (16, 32, 64)
            for (block_m, warps), block_h, reload, stages in itertools.product(rows, hidden, (False, True), (1, 2, 3)):
                if block_m * sizes[0] <= 128 * 256:
                    yield MlpConfig(block_m, block_h, reload, warps, stages)
        case "linear" | "conv_norm":
            if operation == "conv_norm" and dtype != torch.float32:  # where cuDNN may take TF32 for it
                yield None
            tiles = [(64,), (128,), (256,), (128, 128), (128, 64), (128, 64, 32), (128, 32), (256, 64)]
            fitting = [widths for widths in tiles if -(-sizes[0] // sum(widths)) * sum(widths) <= 1.15 * sizes[0]]
            depths = ((32, 3), (32, 4), (64, 3), (64, 4)) if dtype != torch.float32 else ((16, 3), (32, 2), (32, 3))
            for block_m, widths, (block_k, stages) in itertools.product((64, 128), fitting or [(128,)], depths):
                for warps in (4, 8) if block_m * sum(widths) <= 128 * 128 else (8,):
                    yield LinearConfig(block_m, widths, block_k, warps, stages)
        case "bias_attention":
            most = max(16, 2 * sizes[0])
            for block_m, block_n, warps in itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (2, 4, 8)):
                for stages in (1,) if block_n >= sizes[0] else (1, 2):
                    if block_m <= most and block_n <= most:
                        yield AttentionConfig(block_m, block_n, warps, stages)
        case "pool_mixer" | "split_sum":
            for elements, block_c, warps in itertools.product((512, 1024, 2048, 4096), (8, 16, 32, 64), (2, 4, 8)):
                yield PoolConfig(elements, block_c, warps)
        case "head":
            yield None
            sizes_of_tiles, classes = (8192, 16384, 32768), (8, 16, 32, 64, 128)
            for elements, block_n, warps in itertools.product(sizes_of_tiles, classes, (4, 8, 16)):
                if elements <= 2048 * warps:
                    yield HeadConfig(elements, block_n, warps)
        case "token_mean":
            for elements, warps in itertools.product((4096, 8192, 16384, 32768), (4, 8, 16)):
                yield NormConfig(elements, warps)
        case _:
            for elements, warps in itertools.product((512, 1024, 2048, 4096), (1, 2, 4, 8)):
                yield NormConfig(elements, warps)


def _splits(channels: int) -> Iterator[SplitConfig]:
    for block_m, block_h, chunk in itertools.product((16, 32, 64), (32, 64), (32, 64, 128, 256)):
        for stages in (1, 2) if chunk > block_h else (1,):  # a chunk that is one tile needs no pipeline
            if chunk >= block_h:
                yield SplitConfig(block_m, block_h, chunk, 4 if block_m * channels <= 16 * 512 else 8, stages)
