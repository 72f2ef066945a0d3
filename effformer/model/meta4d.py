"""The 4D MetaBlock: pooling token mixer, then convolutional MLP (arXiv 2206.01191, section 4)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops
from ..backend import products_dtype
from ..config import EfficientFormerConfig
from ..reference import upcast
from .batch_norm import group_of, move_statistics
from .fusion import Fusable, fusable, is_active, uses_batch
from .parts import DROP_PATHS, LayerScale, activation, drop_path, factors, fold_norm
from .steps import Fold, Source, Step

if TYPE_CHECKING:
    import torch.distributed as dist


class Pooling(nn.Module):
    """avg_pool3x3(x) - x on [B, C, H, W]; padding does not count into the average."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x) - x


class ConvMlp(nn.Module):
    """1x1 convolution, BatchNorm, activation, 1x1 convolution, BatchNorm, on [B, C, H, W]."""

    def __init__(self, width: int, config: EfficientFormerConfig, **dd: Any) -> None:
        super().__init__()
        hidden = int(width * config.mlp_ratio)
        self.fc1 = nn.Conv2d(width, hidden, 1, **dd)
        self.norm1 = nn.BatchNorm2d(hidden, **dd)
        self.act = activation(config.act, dd)
        self.fc2 = nn.Conv2d(hidden, width, 1, **dd)
        self.norm2 = nn.BatchNorm2d(width, **dd)
        self.drop = nn.Dropout(config.proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.act(self.norm1(self.fc1(x))))
        return self.drop(self.norm2(self.fc2(x)))


class Meta4D(Fusable):
    """4D MetaBlock (paper section 4): pooling token mixer, then convolutional MLP; [B, C, H, W] -> the same.

    The fused operation returns x's dtype. The modules under autocast return float32, as in timm: the layer scales
    promote the sum.
    """

    def __init__(
        self, width: int, config: EfficientFormerConfig, rate: float, layer_scale: float, backend: str, **dd: Any
    ) -> None:
        super().__init__()
        self.token_mixer = Pooling()
        self.ls1 = LayerScale(width, layer_scale, dim=1, **dd)
        self.drop_path1 = drop_path(rate)
        self.mlp = ConvMlp(width, config, **dd)
        self.ls2 = LayerScale(width, layer_scale, dim=1, **dd)
        self.drop_path2 = drop_path(rate)
        self.activation = config.act
        self.backend = backend
        self.note_parts(drop_path1=DROP_PATHS, drop_path2=DROP_PATHS)

    @fusable
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.token_mixer(x)))
        return x + self.drop_path2(self.ls2(self.mlp(x)))

    def fused(self, x: Tensor) -> Tensor:
        return ops.meta4d(x, *self.folded(), activation=self.activation, backend=self.backend)

    def why_no_fused_training(self) -> str | None:
        parts = self.plain_parts()
        if isinstance(parts, str):
            return parts
        if is_active(self.mlp.drop):
            return "dropout is active here (training mode)"
        norms = self.mlp.norm1, self.mlp.norm2
        if uses_batch(norms[0]) != uses_batch(norms[1]):
            return "one BatchNorm uses batch statistics, the other one does not"
        if group_of(norms[0]) is not group_of(norms[1]):
            return "its BatchNorms share their batch statistics with different processes"
        return None

    def fused_training(self, x: Tensor) -> Tensor:
        branch = torch.promote_types(products_dtype(x), self.ls1.gamma.dtype)
        keep1 = factors(self.drop_path1, x, branch)
        keep2 = factors(self.drop_path2, x, branch)
        found = self._operation(x, keep1, keep2, group_of(self.mlp.norm1))
        move_statistics(self.mlp.norm1, found.mean1, found.var1, found.values)
        move_statistics(self.mlp.norm2, found.mean2, found.var2, found.values)
        return found.result

    def describe_training(self, x: Tensor) -> object:
        """As if for this process alone: the others may not call."""
        keep = x.new_ones(len(x), dtype=torch.float32)
        keep1, keep2 = (keep if is_active(path) else None for path in (self.drop_path1, self.drop_path2))
        return self._operation(x, keep1, keep2)

    def _operation(
        self, x: Tensor, keep1: Tensor | None, keep2: Tensor | None, group: dist.ProcessGroup | None = None
    ) -> ops.TrainingResult:
        """`ops.meta4d_train`, with the running statistics where the norms use these."""
        mlp = self.mlp
        norm1, norm2 = mlp.norm1, mlp.norm2
        moving = (None,) * 4 if uses_batch(norm1) else _statistics(norm1) + _statistics(norm2)
        return ops.meta4d_train(
            x,
            upcast(self.ls1.gamma),
            mlp.fc1.weight.flatten(1),
            None if mlp.fc1.bias is None else upcast(mlp.fc1.bias),
            upcast(norm1.weight),
            upcast(norm1.bias),
            mlp.fc2.weight.flatten(1),
            None if mlp.fc2.bias is None else upcast(mlp.fc2.bias),
            upcast(norm2.weight),
            upcast(norm2.bias),
            upcast(self.ls2.gamma),
            keep1,
            keep2,
            *moving,
            eps1=norm1.eps,
            eps2=norm2.eps,
            activation=self.activation,
            process_group=group,
            backend=self.backend,
        )

    def folded(self, fold: Fold = ops) -> tuple[Tensor, ...]:
        """Layer scale, weights, scales and shifts, as `ops.meta4d` takes them after x."""
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        scale1, shift1 = fold_norm(fold, fc1, self.mlp.norm1)
        scale2, shift2 = fold_norm(fold, fc2, self.mlp.norm2, self.ls2.gamma)
        return fold.upcast(self.ls1.gamma), fc1.weight.flatten(1), scale1, shift1, fc2.weight.flatten(1), scale2, shift2

    def steps(self, source: Source) -> Iterator[Step]:
        yield Step.of(source, "meta4d", *self.folded(source), activation=self.activation)


def _statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The running mean and variance, float32 (float64 if they are)."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return upcast(norm.running_mean), upcast(norm.running_var)
