"""The parts of an EfficientFormer: stem, downsampling, 3D MetaBlocks (arXiv 2206.01191, section 4); see `meta4d.py`.

`forward` of a block calls its modules, as in the paper. Where `fusable` finds that the fused operations of
`effformer.ops` compute the same, `fused` runs in its place. Module names are timm's. `dd` holds the keywords `device`
and `dtype` of torch's modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops, reference
from ..backend import products_dtype
from ..config import EfficientFormerConfig
from . import live
from .bias_buffer import why_unusable
from .fusion import Fusable, fusable, is_active, is_plain, why_other_halving
from .parts import DROP_PATHS, LayerScale, activation, drop_path, factors, fold_norm
from .steps import BIAS, Fold, Source, Step


class Stem(live.Planned, nn.Sequential):
    """Two 3x3 convolutions of stride 2 with BatchNorm and ReLU: [B, in_chans, H, W] -> [B, width, H/4, W/4]."""

    backend = "auto"

    def __init__(self, in_chans: int, width: int, backend: str, **dd: Any) -> None:
        super().__init__()
        self.backend = backend
        self.conv1 = nn.Conv2d(in_chans, width // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(width // 2, **dd)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width // 2, width, 3, stride=2, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(width, **dd)
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        result = live.run(self, x)
        return nn.Sequential.forward(self, x) if result is None else result  # type: ignore[no-untyped-call]

    def why_unplanned(self) -> str | None:
        return self.why_composed()

    def why_composed(self) -> str | None:
        """The reason why `conv_norm` does not compute the same as the modules now; None where it does."""
        # A Sequential calls all its modules, in their order.
        if tuple(self._modules) != ("conv1", "norm1", "act1", "conv2", "norm2", "act2"):
            return "modules were added, removed or moved"
        for name, relu in (("act1", self.act1), ("act2", self.act2)):
            if not is_plain(relu, (nn.ReLU,)):
                return f"submodule {name!r} was replaced, changed or has hooks"
        return why_other_halving(self.conv1, self.norm1, ("conv1", "norm1")) or why_other_halving(
            self.conv2, self.norm2, ("conv2", "norm2")
        )

    def folded(self, fold: Fold = ops) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """(weight, scale, shift) of both convolutions in eval mode."""
        first, second = fold_norm(fold, self.conv1, self.norm1), fold_norm(fold, self.conv2, self.norm2)
        return (self.conv1.weight, *first), (self.conv2.weight, *second)

    def input(self, x: Tensor) -> Tensor | None:
        if x.ndim != 4 or x.shape[1] != self.conv1.in_channels:
            return None
        from ..kernels.conv_norm import GATHERED
        from ..kernels.layout import dense_map

        return x if x.shape[1] <= GATHERED else dense_map(x)

    def steps(self, source: Source) -> Iterator[Step]:
        for convolution in self.folded(source):
            yield Step.of(source, "conv_norm", *convolution, activation="relu")


class Downsample(nn.Module):
    """3x3 convolution of stride 2 with BatchNorm: [B, in_width, H, W] -> [B, width, ceil(H/2), ceil(W/2)]."""

    def __init__(self, in_width: int, width: int, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_width, width, 3, stride=2, padding=1, **dd)
        self.norm = nn.BatchNorm2d(width, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def why_composed(self) -> str | None:
        """The reason why `conv_norm` does not compute the same as the modules now; None where it does."""
        return why_other_halving(self.conv, self.norm)

    def folded(self, fold: Fold = ops) -> tuple[Tensor, Tensor, Tensor]:
        """(weight, scale, shift) of the convolution in eval mode."""
        return self.conv.weight, *fold_norm(fold, self.conv, self.norm)

    def steps(self, source: Source) -> Iterator[Step]:
        yield Step.of(source, "conv_norm", *self.folded(source))


class Flat(nn.Module):
    """[B, C, H, W] -> [B, N, C] with N = H * W: from a map to tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)

    def steps(self, source: Source) -> Iterator[Step]:
        yield Step("tokens")


class Attention(Fusable):
    """Multi-head self-attention with a learned bias for each offset between two tokens; [B, N, C] -> the same.

    `attention_bias_idxs` is a buffer, int64 [T * T, T * T] for a table of a [T, T] map: state dicts of timm and the
    original have it. It is never read, since each forward computes the bias from the map's size, without a cache. So an
    average of networks may round it; state dicts hold the standard index all the same.
    """

    attention_bias_idxs: Tensor

    def __init__(self, width: int, config: EfficientFormerConfig, backend: str, **dd: Any) -> None:
        super().__init__()
        self.num_heads, self.key_dim = config.num_heads, config.key_dim
        self.resolution, self.bias_resize = config.table_resolution, config.bias_resize
        self.backend = backend
        values = self.num_heads * config.value_dim
        self.qkv = nn.Linear(width, 2 * self.num_heads * self.key_dim + values, **dd)
        self.proj = nn.Linear(values, width, **dd)
        self.attn_drop = nn.Dropout(config.attn_drop)
        self.proj_drop = nn.Dropout(config.attn_drop)
        self.attention_biases = nn.Parameter(torch.zeros(self.num_heads, self.resolution**2, **dd))
        self.register_buffer("attention_bias_idxs", self._standard_index())
        self.parts = (("", "attn_drop", (nn.Dropout,)),)  # `attend` calls no other

    def _standard_index(self, device: torch.device | None = None) -> Tensor:
        """Entry of the table for each pair of tokens of a [resolution, resolution] map, int64."""
        return reference.bias_index(self.resolution, self.resolution, device or self.attention_biases.device)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = self.attend(self.qkv(x), self.bias(height, width))
        return self.proj_drop(self.proj(x))

    @fusable
    def attend(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """softmax(q · kᵀ * key_dim**-0.5 + bias) · v for each head, with dropout on the probabilities."""
        heads = {"num_heads": self.num_heads, "key_dim": self.key_dim}
        return reference.bias_attention(qkv, bias, **heads, dropout=self.attn_drop)

    def fused(self, qkv: Tensor, bias: Tensor) -> Tensor:
        return ops.bias_attention(qkv, bias, num_heads=self.num_heads, key_dim=self.key_dim, backend=self.backend)

    def bias(self, height: int, width: int) -> Tensor:
        """The bias [num_heads, N, N] of a [height, width] map, N = height * width."""
        return ops.expand_bias(
            self.attention_biases, height, width, resolution=self.resolution, resize=self.bias_resize
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "attention_bias_idxs"] = self._standard_index()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The index is derived, so a file may leave it out. Another index belongs to another network.
        key = prefix + "attention_bias_idxs"
        if key in state_dict and (problem := why_unusable(state_dict[key], self.resolution)):
            args[-1].append(f"{key}: {problem}")  # error_msgs
            return
        beside = state_dict.get(prefix + "attention_biases", self.attention_biases)
        state_dict = {**state_dict, key: self._standard_index(beside.device)}  # with assign=True it becomes the buffer
        super()._load_from_state_dict(state_dict, prefix, *args)


class LinearMlp(nn.Module):
    """Linear, activation, Linear, on [B, N, C]."""

    def __init__(self, width: int, config: EfficientFormerConfig, **dd: Any) -> None:
        super().__init__()
        hidden = int(width * config.mlp_ratio)
        self.fc1 = nn.Linear(width, hidden, **dd)
        self.act = activation(config.act, dd)
        self.drop1 = nn.Dropout(config.proj_drop)
        self.fc2 = nn.Linear(hidden, width, **dd)
        self.drop2 = nn.Dropout(config.proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(x))


class Meta3D(Fusable):
    """3D MetaBlock (paper section 4): attention, then MLP, each after LayerNorm; [B, N, C] -> the same.

    `height` and `width` are the sides of the map that the N tokens came from. Dtypes are as in `Meta4D`.
    """

    def __init__(
        self, width: int, config: EfficientFormerConfig, rate: float, layer_scale: float, backend: str, **dd: Any
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, **dd)
        self.token_mixer = Attention(width, config, backend, **dd)
        self.ls1 = LayerScale(width, layer_scale, dim=-1, **dd)
        self.drop_path1 = drop_path(rate)
        self.norm2 = nn.LayerNorm(width, **dd)
        self.mlp = LinearMlp(width, config, **dd)
        self.ls2 = LayerScale(width, layer_scale, dim=-1, **dd)
        self.drop_path2 = drop_path(rate)
        self.activation = config.act
        self.backend = backend
        self.note_parts(drop_path1=DROP_PATHS, drop_path2=DROP_PATHS)

    @fusable
    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.token_mixer(self.norm1(x), height, width)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def fused(self, x: Tensor, height: int, width: int) -> Tensor:
        return self._fused_mlp(self._fused_mixer(x, height, width))

    def _fused_mixer(self, x: Tensor, height: int, width: int) -> Tensor:
        mixer = self.token_mixer
        return ops.attention_mixer(
            x,
            *self.folded_mixer(mixer.bias(height, width)),
            num_heads=mixer.num_heads,
            key_dim=mixer.key_dim,
            eps=self.norm1.eps,
            backend=self.backend,
        )

    def _fused_mlp(self, x: Tensor) -> Tensor:
        return ops.linear_mlp(
            x, *self.folded_mlp(), activation=self.activation, eps=self.norm2.eps, backend=self.backend
        )

    def why_no_fused_training(self) -> str | None:
        parts = self.plain_parts()
        if isinstance(parts, str):
            return parts
        mixer, mlp = self.token_mixer, self.mlp
        if is_active(mixer.attn_drop, mixer.proj_drop, mlp.drop1, mlp.drop2):
            return "dropout is active here (training mode)"
        return None

    def fused_training(self, x: Tensor, height: int, width: int) -> Tensor:
        """Both halves of the block by kernels; stochastic depth scales what each half adds to an image."""
        branch = torch.promote_types(products_dtype(x), self.ls1.gamma.dtype)
        x = _kept(x, self._fused_mixer(x, height, width), factors(self.drop_path1, x, branch))
        return _kept(x, self._fused_mlp(x), factors(self.drop_path2, x, branch))

    def folded_mixer(self, bias: Tensor, fold: Fold = ops) -> tuple[Tensor, ...]:
        """Norm, weights, the attention's `bias`, scale and shift, as `ops.attention_mixer` takes them after x."""
        mixer = self.token_mixer
        scale = fold.fold_layer_scale(mixer.proj.bias, self.ls1.gamma)
        norm = fold.upcast(self.norm1.weight), fold.upcast(self.norm1.bias)
        return *norm, mixer.qkv.weight, fold.upcast(mixer.qkv.bias), bias, mixer.proj.weight, scale[0], scale[1]

    def folded_mlp(self, fold: Fold = ops) -> tuple[Tensor, ...]:
        """Norm, weights, scale and shifts, as `ops.linear_mlp` takes them after x."""
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        scale = fold.fold_layer_scale(fc2.bias, self.ls2.gamma)
        norm = fold.upcast(self.norm2.weight), fold.upcast(self.norm2.bias)
        return *norm, fc1.weight, fold.upcast(fc1.bias), fc2.weight, scale[0], scale[1]

    def steps(self, source: Source) -> Iterator[Step]:
        mixer = self.token_mixer
        tensors = list(self.folded_mixer(mixer.attention_biases, source))
        del tensors[BIAS]  # it depends on the image size
        heads = {"num_heads": mixer.num_heads, "key_dim": mixer.key_dim, "eps": self.norm1.eps}
        mix = Step.of(source, "attention_mixer", *tensors, **heads)
        mix.table = source.table(mixer.attention_biases)
        mix.resize = {"resolution": mixer.resolution, "resize": mixer.bias_resize}
        yield mix
        yield Step.of(source, "linear_mlp", *self.folded_mlp(source), activation=self.activation, eps=self.norm2.eps)


def _kept(x: Tensor, result: Tensor, keep: Tensor | None) -> Tensor:
    """x + keep * (result - x), for tokens x [B, N, C] and factors keep [B]."""
    return result if keep is None else torch.addcmul(x, result - x, keep[:, None, None]).to(x.dtype)
