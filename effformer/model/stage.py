"""A stage of the network, and gradient checkpointing of its blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..config import EfficientFormerConfig
from ..workload import halved
from . import live
from .blocks import Downsample, Flat, Meta3D
from .fusion import why_other
from .meta4d import Meta4D
from .steps import Source, Step


class Stage(live.Planned, nn.Module):
    """Downsampling (not in the first stage) and MetaBlocks; the last `num_vit` of them work on tokens.

    [B, in_width, H, W] -> [B, width, h, w], or [B, h * w, width] in a stage that flattens.
    """

    def __init__(
        self,
        in_width: int | None,
        width: int,
        drop_paths: Sequence[float],
        num_vit: int | None,
        config: EfficientFormerConfig,
        layer_scale: float,
        backend: str,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.width = width
        self.grad_checkpointing = False
        self.num_vit = num_vit or 0
        self.downsample = nn.Identity() if in_width is None else Downsample(in_width, width, **dd)
        blocks: list[nn.Module] = []
        num_maps = len(drop_paths) - self.num_vit
        for index, drop_path in enumerate(drop_paths):
            if index == num_maps:
                blocks.append(Flat())
            kind = Meta4D if index < num_maps else Meta3D
            blocks.append(kind(width, config, drop_path, layer_scale, backend, **dd))
        if num_vit == 0:  # a last stage without 3D blocks still hands tokens to the final norm
            blocks.append(Flat())
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        planned = live.run(self, x)
        if planned is not None:
            return planned
        x = self.downsample(x)
        height, width = x.shape[2], x.shape[3]
        first_token_block = len(self.blocks) - self.num_vit
        for index, block in enumerate(self.blocks):
            args = (x,) if index < first_token_block else (x, height, width)
            x = _checkpointed(block, *args) if self.grad_checkpointing else block(*args)
        return x

    def parts(self) -> Iterator[tuple[str, nn.Module, tuple[type[nn.Module], ...]]]:
        """Name, module, and its classes as this stage was built; outer modules come before inner ones."""
        yield "downsample", self.downsample, (Downsample, nn.Identity)
        yield "blocks", self.blocks, (nn.Sequential,)
        for index, block in enumerate(self.blocks):
            tokens = index >= len(self.blocks) - self.num_vit
            yield f"blocks.{index}", block, (Meta3D,) if tokens else (Meta4D, Flat)

    def why_unplanned(self) -> str | None:
        for name, module, kinds in self.parts():
            if reason := why_other(module, kinds):
                return f"{name}: {reason}"
        return None

    def input(self, x: Tensor) -> Tensor | None:
        width = self.downsample.conv.in_channels if isinstance(self.downsample, Downsample) else self.width
        if x.ndim != 4 or x.shape[1] != width:
            return None
        from ..kernels.layout import dense_map

        return dense_map(x)

    def backends(self) -> set[str]:
        return {block.backend for block in self.blocks if isinstance(block, (Meta4D, Meta3D))}

    def steps(self, source: Source) -> Iterator[Step]:
        for part in (self.downsample, *self.blocks):
            if not isinstance(part, nn.Identity):
                yield from cast("Downsample | Meta4D | Meta3D | Flat", part).steps(source)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Sides of this stage's map for an input map of [height, width]."""
        if isinstance(self.downsample, nn.Identity):
            return height, width
        return halved(height), halved(width)


class StageOutput(NamedTuple):
    """Output of a stage: a map [B, C, H, W], or tokens [B, N, C] of a map with the sides `tokens_of`."""

    stage: int
    features: Tensor
    tokens_of: tuple[int, int] | None


def _checkpointed(block: nn.Module, *args: Any) -> Tensor:
    if torch.compiler.is_compiling():  # the compiler accepts no context, and does not repeat side effects
        return checkpoint(block, *args, use_reentrant=False)
    contexts = (contextlib.nullcontext(), _FrozenStatistics(block))
    return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: contexts)


class _FrozenStatistics:
    """Keep a block's running statistics while it is recomputed: they have moved already. May be entered again."""

    def __init__(self, block: nn.Module) -> None:
        self.norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]

    def __enter__(self) -> None:
        self.saved = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for norm in self.norms:
            norm.momentum = 0.0
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked = norm.num_batches_tracked.clone()

    def __exit__(self, *exception: object) -> None:
        for norm, (momentum, count) in zip(self.norms, self.saved, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
