"""EfficientFormers built as the original repository and NetsPresso Trainer build theirs, for want of the real ones.

Written anew with their structure: module names, places of dropout, caches of eval mode, results.
test_accelerate.py compares them with golden outputs of the real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Depths = Sequence[int]


class DropPath(nn.Module):
    """timm's, which both use."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * torch.bernoulli(torch.full((len(x), *[1] * (x.ndim - 1)), keep, dtype=x.dtype)) / keep


def _drop_path(rate: float) -> nn.Module:
    return DropPath(rate) if rate > 0 else nn.Identity()


def _offsets(resolution: int) -> Tensor:
    """Each pair of pixels' |dy|, |dx|, numbered in the order in which they come."""
    points = [(y, x) for y in range(resolution) for x in range(resolution)]
    seen: dict[tuple[int, int], int] = {}
    numbers = [[seen.setdefault((abs(y1 - y2), abs(x1 - x2)), len(seen)) for y2, x2 in points] for y1, x1 in points]
    return torch.tensor(numbers)


class Pooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x) - x


class Tokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mT


def _to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    return tokens.mT.unflatten(2, (height, width))


# --- the original repository ------------------------------------------------------------------------------------------


class OriginalAttention(nn.Module):
    def __init__(self, width: int, heads: int, key_dim: int, resolution: int, dense: bool) -> None:
        super().__init__()
        self.heads, self.key_dim, self.value_dim = heads, key_dim, 4 * key_dim
        self.qkv = nn.Linear(width, heads * (2 * key_dim + self.value_dim))
        self.proj = nn.Linear(heads * self.value_dim, width)
        self.suffix = "_seg" if dense else ""
        if dense:
            self.register_buffer("attention_biases", torch.zeros(heads, 49))
            self.register_buffer("attention_bias_idxs", torch.ones(49, 49, dtype=torch.int64))
        self.register_parameter(f"attention_biases{self.suffix}", nn.Parameter(torch.zeros(heads, resolution**2)))
        self.register_buffer(f"attention_bias_idxs{self.suffix}", _offsets(resolution))

    def expanded(self) -> Tensor:
        return getattr(self, f"attention_biases{self.suffix}")[:, getattr(self, f"attention_bias_idxs{self.suffix}")]

    @torch.no_grad()
    def train(self, mode: bool = True) -> None:  # returns nothing there, too
        super().train(mode)
        if mode and hasattr(self, "ab"):
            del self.ab
        else:
            self.ab = self.expanded()

    def forward(self, x: Tensor) -> Tensor:
        split = [self.key_dim, self.key_dim, self.value_dim]
        q, k, v = self.qkv(x).unflatten(2, (self.heads, -1)).transpose(1, 2).split(split, dim=3)
        bias = self.expanded() if self.training else self.ab
        scores = q @ k.mT * self.key_dim**-0.5
        if self.suffix:
            bias = F.interpolate(bias[None], scores.shape[2:], mode="bicubic")
        return self.proj(((scores + bias).softmax(3) @ v).transpose(1, 2).flatten(2))


class OriginalBlock(nn.Module):
    def __init__(self, width: int, attention: nn.Module | None, ratio: int, act: Any, drop: float, path: float) -> None:
        super().__init__()
        hidden = width * ratio
        self.mlp = nn.Module()
        if attention is None:
            self.token_mixer: nn.Module = Pooling()
            self.mlp.fc1, self.mlp.fc2 = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)
            self.mlp.act, self.mlp.drop = act(), nn.Dropout(drop)
            self.mlp.norm1, self.mlp.norm2 = nn.BatchNorm2d(hidden), nn.BatchNorm2d(width)
        else:
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.token_mixer = attention
            self.mlp.fc1, self.mlp.fc2, self.mlp.act = nn.Linear(width, hidden), nn.Linear(hidden, width), act()
            self.mlp.drop1, self.mlp.drop2 = nn.Dropout(drop), nn.Dropout(drop)
        self.drop_path = _drop_path(path)
        self.layer_scale_1, self.layer_scale_2 = (nn.Parameter(torch.full((width,), 1e-5)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        mlp = self.mlp
        if hasattr(self, "norm1"):
            x = x + self.drop_path(self.layer_scale_1 * self.token_mixer(self.norm1(x)))
            y = mlp.drop2(mlp.fc2(mlp.drop1(mlp.act(mlp.fc1(self.norm2(x))))))
            return x + self.drop_path(self.layer_scale_2 * y)
        x = x + self.drop_path(self.layer_scale_1[:, None, None] * self.token_mixer(x))
        y = mlp.drop(mlp.norm2(mlp.fc2(mlp.drop(mlp.act(mlp.norm1(mlp.fc1(x)))))))
        return x + self.drop_path(self.layer_scale_2[:, None, None] * y)


class Original(nn.Module):
    """Logits (their mean in eval mode, both heads' in training), or with `dense` four normalised maps."""

    def __init__(
        self,
        depths: Depths = (3, 2, 6, 4),
        widths: Sequence[int] = (48, 96, 224, 448),
        num_vit: int = 1,
        *,
        num_classes: int = 1000,
        heads: int = 8,
        key_dim: int = 32,
        resolution: int = 7,
        ratio: int = 4,
        act: Any = nn.GELU,
        drop: float = 0.0,
        drop_path: float = 0.0,
        dense: bool = False,
        distillation: bool = True,
    ) -> None:
        super().__init__()
        half = widths[0] // 2
        self.patch_embed = nn.Sequential(
            nn.Conv2d(3, half, 3, 2, 1), nn.BatchNorm2d(half), nn.ReLU(),
            nn.Conv2d(half, widths[0], 3, 2, 1), nn.BatchNorm2d(widths[0]), nn.ReLU(),
        )  # fmt: skip
        network: list[nn.Module] = []
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            if stage:
                down = nn.Sequential()
                down.add_module("proj", nn.Conv2d(widths[stage - 1], width, 3, 2, 1))
                down.add_module("norm", nn.BatchNorm2d(width))
                network.append(down)
            blocks: list[nn.Module] = []
            for index in range(depth):
                attends = stage == 3 and depth - index <= num_vit
                if attends and depth - index == num_vit:
                    blocks.append(Tokens())
                attention = OriginalAttention(width, heads, key_dim, resolution, dense) if attends else None
                path = drop_path * (index + sum(depths[:stage])) / (sum(depths) - 1)
                blocks.append(OriginalBlock(width, attention, ratio, act, drop, path))
            network.append(nn.Sequential(*blocks))
        self.network = nn.ModuleList(network)
        self.fork_feat = dense
        if dense:
            for index, width in zip((0, 2, 4, 6), widths, strict=True):
                self.add_module(f"norm{index}", nn.GroupNorm(1, width))
        else:
            self.num_classes, self.dist = num_classes, distillation
            self.norm = nn.LayerNorm(widths[-1])
            self.head = nn.Linear(widths[-1], num_classes) if num_classes else nn.Identity()
            if distillation:
                self.dist_head = nn.Linear(widths[-1], num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Any:
        x, outputs = self.patch_embed(x), []
        for index, part in enumerate(self.network):
            size = -(-x.shape[2] // (1 + index % 2)), -(-x.shape[3] // (1 + index % 2))
            x = part(x)
            if self.fork_feat and index % 2 == 0:
                outputs.append(getattr(self, f"norm{index}")(_to_map(x, *size) if x.ndim == 3 else x))
        if self.fork_feat:
            return outputs
        x = self.norm(x).mean(1)
        if not self.dist:
            return self.head(x)
        both = self.head(x), self.dist_head(x)
        return both if self.training else (both[0] + both[1]) / 2


# --- NetsPresso Trainer -----------------------------------------------------------------------------------------------


class ConvLayer(nn.Module):
    def __init__(self, *convolution: Any, act: nn.Module | None = None) -> None:
        super().__init__()
        self.block = nn.Sequential()
        self.block.add_module("conv", nn.Conv2d(*convolution))
        self.block.add_module("norm", nn.BatchNorm2d(convolution[1]))
        if act is not None:
            self.block.add_module("act", act)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class TrainerAttention(nn.Module):
    def __init__(self, width: int, heads: int, key_dim: int, drop: float) -> None:
        super().__init__()
        self.heads, self.key_dim = heads, key_dim
        self.query, self.key = nn.Linear(width, heads * key_dim), nn.Linear(width, heads * key_dim)
        self.value, self.linear = nn.Linear(width, heads * key_dim * 4), nn.Linear(heads * key_dim * 4, width)
        self.dropout = nn.Dropout(drop)
        self.attention_biases = nn.Parameter(torch.zeros(heads, 49))
        self.register_buffer("attention_bias_idxs", torch.ones(49, 49, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        scores = q @ k.mT / self.key_dim**0.5
        bias = self.attention_biases[:, self.attention_bias_idxs][None]
        scores = scores + F.interpolate(bias, scores.shape[2:], mode="bilinear")
        return self.dropout(self.linear((self.dropout(scores.softmax(3)) @ v).transpose(1, 2).flatten(2)))


class TrainerBlock(nn.Module):
    def __init__(self, width: int, attention: nn.Module | None, ratio: int, act: Any, drop: float, path: float) -> None:
        super().__init__()
        hidden = width * ratio
        self.channel_mlp = nn.Sequential()
        ffn = nn.Sequential()
        if attention is None:
            self.layernorm_before, self.layernorm_after = nn.Identity(), nn.Identity()
            self.token_mixer: nn.Module = Pooling()
            ffn.add_module("conv_1x1_1", ConvLayer(width, hidden, 1, act=act()))
            ffn.add_module("drop", nn.Dropout(drop))
            ffn.add_module("conv_1x1_2", ConvLayer(hidden, width, 1))
        else:
            self.layernorm_before, self.layernorm_after = nn.LayerNorm(width), nn.LayerNorm(width)
            self.token_mixer = attention
            ffn.add_module("dense1", nn.Linear(width, hidden))
            ffn.add_module("act", act())
            ffn.add_module("dropout", nn.Dropout(drop))
            ffn.add_module("dense2", nn.Linear(hidden, width))
        self.channel_mlp.add_module("ffn", ffn)
        self.channel_mlp.add_module("dropout", nn.Dropout(drop))
        self.drop_path = _drop_path(path)
        self.layer_scale_1, self.layer_scale_2 = (nn.Parameter(torch.full((width,), 1e-5)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.layer_scale_1, self.layer_scale_2
        if x.ndim == 4:
            one, two = one[:, None, None], two[:, None, None]
        x = x + self.drop_path(one * self.token_mixer(self.layernorm_before(x)))
        return x + self.drop_path(two * self.channel_mlp(self.layernorm_after(x)))


class TrainerEmbedding(nn.Module):
    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.proj = ConvLayer(in_width, width, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Trainer(nn.Module):
    """NetsPresso's: {"last_feature": [B, C]}, or {"intermediate_features": four maps, normalised in the path}."""

    def __init__(
        self,
        task: str = "classification",
        depths: Depths = (3, 2, 6, 4),
        widths: Sequence[int] = (48, 96, 224, 448),
        num_vit: int = 1,
        *,
        heads: int = 8,
        key_dim: int = 32,
        ratio: int = 4,
        act: Any = nn.GELU,
        drop: float = 0.0,
        attention_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.task = task
        half = widths[0] // 2
        self.patch_embed = nn.Module()
        self.patch_embed.stem = nn.Sequential(
            ConvLayer(3, half, 3, 2, 1, act=nn.ReLU()), ConvLayer(half, widths[0], 3, 2, 1, act=nn.ReLU())
        )
        parts: list[nn.Module] = []
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            if stage:
                parts.append(TrainerEmbedding(widths[stage - 1], width))
            blocks: list[nn.Module] = []
            for index in range(depth):
                attends = stage == 3 and depth - index <= num_vit
                if attends and depth - index == num_vit:
                    blocks.append(Tokens())
                attention = TrainerAttention(width, heads, key_dim, attention_drop) if attends else None
                blocks.append(TrainerBlock(width, attention, ratio, act, drop, 0.0))
            parts.append(nn.Sequential(*blocks))
        self.encoder = nn.Module()
        self.encoder.blocks = nn.ModuleList(parts)
        if task != "classification":
            for index, width in zip((0, 2, 4, 6), widths, strict=True):
                self.encoder.add_module(f"norm{index}", nn.GroupNorm(1, width))
        self.norm = nn.LayerNorm(widths[-1])

    def forward(self, x: Tensor) -> dict[str, Any]:
        x, outputs = self.patch_embed.stem(x), []
        for index, part in enumerate(self.encoder.blocks):
            size = -(-x.shape[2] // (1 + index % 2)), -(-x.shape[3] // (1 + index % 2))
            x = part(x)
            if self.task != "classification" and index % 2 == 0:
                x = getattr(self.encoder, f"norm{index}")(_to_map(x, *size) if x.ndim == 3 else x)
                outputs.append(x)
        return {"intermediate_features": outputs} if outputs else {"last_feature": self.norm(x).mean(1)}
