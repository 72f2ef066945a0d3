"""The parts of an EfficientFormer: stem, downsampling, 4D and 3D MetaBlocks (arXiv 2206.01191, section 4).

A block calls the fused operations of `effformer.ops` where those describe what is to be computed, and is composed of
plain modules where batch statistics, dropout, a parametrised activation, hooks or replaced submodules ask for it.
Module names are timm's. `dd` holds the factory keywords `device` and `dtype`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops, reference
from ..config import EfficientFormerConfig
from .fusion import is_active, is_plain, why_changed, why_unrolled

ACTIVATION_MODULES: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "hard_swish": nn.Hardswish,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
}


def _activation(name: str, dd: dict[str, Any]) -> nn.Module:
    return nn.PReLU(**dd) if name == "prelu" else ACTIVATION_MODULES[name]()


def _drop_path(rate: float) -> nn.Module:
    return DropPath(rate) if rate > 0 else nn.Identity()


class LayerScale(nn.Module):
    """Multiplication by a learned vector over dimension `dim` of the input, 1 for maps and -1 for tokens."""

    def __init__(self, width: int, init_value: float, *, dim: int, **dd: Any) -> None:
        super().__init__()
        self.dim = dim
        self.gamma = nn.Parameter(torch.full((width,), float(init_value), **dd))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.gamma[:, None, None] if self.dim == 1 else self.gamma)


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, a sample's branch is zeroed with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * (mask / keep if keep > 0 else mask)


class Stem(nn.Sequential):
    """Two 3x3 convolutions of stride 2 with BatchNorm and ReLU: [B, in_chans, H, W] -> [B, width, H/4, W/4]."""

    def __init__(self, in_chans: int, width: int, **dd: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, width // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(width // 2, **dd)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width // 2, width, 3, stride=2, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(width, **dd)
        self.act2 = nn.ReLU()

    def folded(self) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """(weight, scale, shift) of both convolutions in eval mode."""
        return (self.conv1.weight, *_fold(self.conv1, self.norm1)), (self.conv2.weight, *_fold(self.conv2, self.norm2))


class Downsample(nn.Module):
    """3x3 convolution of stride 2 with BatchNorm: [B, in_width, H, W] -> [B, width, ceil(H/2), ceil(W/2)]."""

    def __init__(self, in_width: int, width: int, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_width, width, 3, stride=2, padding=1, **dd)
        self.norm = nn.BatchNorm2d(width, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def folded(self) -> tuple[Tensor, Tensor, Tensor]:
        """(weight, scale, shift) of the convolution in eval mode."""
        return self.conv.weight, *_fold(self.conv, self.norm)


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
        self.act = _activation(config.act, dd)
        self.fc2 = nn.Conv2d(hidden, width, 1, **dd)
        self.norm2 = nn.BatchNorm2d(width, **dd)
        self.drop = nn.Dropout(config.proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.act(self.norm1(self.fc1(x))))
        return self.drop(self.norm2(self.fc2(x)))


class Meta4D(nn.Module):
    """4D MetaBlock (paper section 4): pooling token mixer, then convolutional MLP; [B, C, H, W] -> the same.

    Fused, the output has x's dtype; composed under autocast, the float32 layer scales promote it, as in timm.
    """

    def __init__(
        self, width: int, config: EfficientFormerConfig, drop_path: float, layer_scale: float, backend: str, **dd: Any
    ) -> None:
        super().__init__()
        self.token_mixer = Pooling()
        self.ls1 = LayerScale(width, layer_scale, dim=1, **dd)
        self.drop_path1 = _drop_path(drop_path)
        self.mlp = ConvMlp(width, config, **dd)
        self.ls2 = LayerScale(width, layer_scale, dim=1, **dd)
        self.drop_path2 = _drop_path(drop_path)
        self.activation = config.act
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        if reason := self.why_composed() or why_unrolled(x, self.backend):
            ops.refuse_triton(self.backend, reason)
            x = x + self.drop_path1(self.ls1(self.token_mixer(x)))
            return x + self.drop_path2(self.ls2(self.mlp(x)))
        return ops.meta4d(x, *self.folded(), activation=self.activation, backend=self.backend)

    def folded(self) -> tuple[Tensor, ...]:
        """Layer scale, weights, scales and shifts, as `ops.meta4d` takes them after x."""
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        scale1, shift1 = _fold(fc1, self.mlp.norm1)
        scale2, shift2 = _fold(fc2, self.mlp.norm2, self.ls2.gamma)
        weight1, weight2 = fc1.weight.flatten(1), fc2.weight.flatten(1)
        return ops.upcast(self.ls1.gamma), weight1, scale1, shift1, weight2, scale2, shift2

    def why_composed(self) -> str | None:
        """Why `ops.meta4d` does not describe this forward; None where it does."""
        own = self._modules  # not by attribute: this runs at each forward, and nn.Module.__getattr__ is slow
        inner = self.mlp._modules
        parts = (
            ("token_mixer", own["token_mixer"], (Pooling,)),
            ("token_mixer.pool", self.token_mixer._modules.get("pool"), (nn.AvgPool2d,)),
            ("ls1", own["ls1"], (LayerScale,)),
            ("drop_path1", own["drop_path1"], (nn.Identity, DropPath)),
            ("mlp", own["mlp"], (ConvMlp,)),
            ("mlp.fc1", inner.get("fc1"), (nn.Conv2d,)),
            ("mlp.norm1", inner.get("norm1"), (nn.BatchNorm2d,)),
            ("mlp.act", inner.get("act"), (ACTIVATION_MODULES[self.activation],)),
            ("mlp.fc2", inner.get("fc2"), (nn.Conv2d,)),
            ("mlp.norm2", inner.get("norm2"), (nn.BatchNorm2d,)),
            ("mlp.drop", inner.get("drop"), (nn.Dropout,)),
            ("ls2", own["ls2"], (LayerScale,)),
            ("drop_path2", own["drop_path2"], (nn.Identity, DropPath)),
        )
        if reason := why_changed(parts, self.activation):
            return reason
        mlp = self.mlp
        if any(norm.training or norm.running_mean is None for norm in (mlp.norm1, mlp.norm2)):
            return "BatchNorm uses batch statistics here (training mode)"
        if is_active(mlp.drop, self.drop_path1, self.drop_path2):
            return "dropout or stochastic depth is active here (training mode)"
        return None


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d, layer_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None  # `why_composed` looked
    assert var is not None
    folded = ops.fold_batch_norm(conv.bias, norm.weight, norm.bias, mean, var, norm.eps, layer_scale)
    return folded[0], folded[1]  # FX cannot unpack what it has not run


class Flat(nn.Module):
    """[B, C, H, W] -> [B, N, C] with N = H * W: from a map to tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with a learned bias for each offset between two tokens; [B, N, C] -> the same.

    `attention_bias_idxs` stands in the state dict because timm's and the original's do. It is no buffer: an average of
    weights would average it, too, and round it down. The bias is computed from the map's size at each forward, never
    from this index, and never cached.
    """

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

    @property
    def attention_bias_idxs(self) -> Tensor:
        """Entry of the table for each pair of tokens of a [resolution, resolution] map, int64."""
        return reference.bias_index(self.resolution, self.resolution, self.attention_biases.device)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        qkv, bias = self.qkv(x), self.bias(height, width)
        if reason := self.why_composed() or why_unrolled(x, self.backend):
            ops.refuse_triton(self.backend, reason)
            x = reference.bias_attention(
                qkv, bias, num_heads=self.num_heads, key_dim=self.key_dim, dropout=self.attn_drop
            )
        else:
            x = ops.bias_attention(qkv, bias, num_heads=self.num_heads, key_dim=self.key_dim, backend=self.backend)
        return self.proj_drop(self.proj(x))

    def bias(self, height: int, width: int) -> Tensor:
        """The bias [num_heads, N, N] of a [height, width] map, N = height * width."""
        return ops.expand_bias(
            self.attention_biases, height, width, resolution=self.resolution, resize=self.bias_resize
        )

    def why_composed(self) -> str | None:
        """Why `ops.bias_attention` does not describe this forward; None where it does."""
        if not is_plain(self.attn_drop, (nn.Dropout,)):
            return "submodule 'attn_drop' was replaced, changed or has hooks"
        if self.attn_drop.training and self.attn_drop.p > 0:
            return "attention dropout is active here (training mode)"
        return None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "attention_bias_idxs"] = self.attention_bias_idxs

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # The index is derived: a file may leave it out, but one that says something else means another network.
        key = prefix + "attention_bias_idxs"
        standard = reference.bias_index(self.resolution, self.resolution, device=torch.device("cpu"))
        if key in state_dict and not _same(state_dict[key], standard):
            error_msgs.append(f"{key} is not the standard index |dy| * {self.resolution} + |dx|")
            return
        state_dict = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _same(index: Tensor, standard: Tensor) -> bool:
    return index.shape == standard.shape and (index.is_meta or torch.equal(index.cpu().long(), standard))


class Mlp(nn.Module):
    """Linear, activation, Linear, on [B, N, C]."""

    def __init__(self, width: int, config: EfficientFormerConfig, **dd: Any) -> None:
        super().__init__()
        hidden = int(width * config.mlp_ratio)
        self.fc1 = nn.Linear(width, hidden, **dd)
        self.act = _activation(config.act, dd)
        self.drop1 = nn.Dropout(config.proj_drop)
        self.fc2 = nn.Linear(hidden, width, **dd)
        self.drop2 = nn.Dropout(config.proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(x))


class Meta3D(nn.Module):
    """3D MetaBlock (paper section 4): attention, then MLP, each after LayerNorm; [B, N, C] -> the same.

    `height` and `width` are the sides of the map that the N tokens came from. Fused, the output has x's dtype;
    composed under autocast, the float32 layer scales promote it, as in timm.
    """

    def __init__(
        self, width: int, config: EfficientFormerConfig, drop_path: float, layer_scale: float, backend: str, **dd: Any
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, **dd)
        self.token_mixer = Attention(width, config, backend, **dd)
        self.ls1 = LayerScale(width, layer_scale, dim=-1, **dd)
        self.drop_path1 = _drop_path(drop_path)
        self.norm2 = nn.LayerNorm(width, **dd)
        self.mlp = Mlp(width, config, **dd)
        self.ls2 = LayerScale(width, layer_scale, dim=-1, **dd)
        self.drop_path2 = _drop_path(drop_path)
        self.activation = config.act
        self.backend = backend

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        if reason := self.why_composed() or why_unrolled(x, self.backend):
            ops.refuse_triton(self.backend, reason)
            x = x + self.drop_path1(self.ls1(self.token_mixer(self.norm1(x), height, width)))
            return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
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

    def folded_mixer(self, bias: Tensor) -> tuple[Tensor, ...]:
        """Norm, weights, the attention's `bias`, scale and shift, as `ops.attention_mixer` takes them after x."""
        mixer = self.token_mixer
        scale = ops.fold_layer_scale(mixer.proj.bias, self.ls1.gamma)
        norm = ops.upcast(self.norm1.weight), ops.upcast(self.norm1.bias)
        return *norm, mixer.qkv.weight, ops.upcast(mixer.qkv.bias), bias, mixer.proj.weight, scale[0], scale[1]

    def folded_mlp(self) -> tuple[Tensor, ...]:
        """Norm, weights, scale and shifts, as `ops.linear_mlp` takes them after x."""
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        scale = ops.fold_layer_scale(fc2.bias, self.ls2.gamma)
        norm = ops.upcast(self.norm2.weight), ops.upcast(self.norm2.bias)
        return *norm, fc1.weight, ops.upcast(fc1.bias), fc2.weight, scale[0], scale[1]

    def why_composed(self) -> str | None:
        """Why `ops.attention_mixer` and `ops.linear_mlp` do not describe this forward; None where they do."""
        own = self._modules  # not by attribute, as in Meta4D
        mixer, mlp = self.token_mixer._modules, self.mlp._modules
        parts = (
            ("norm1", own["norm1"], (nn.LayerNorm,)),
            ("token_mixer", own["token_mixer"], (Attention,)),
            ("token_mixer.qkv", mixer.get("qkv"), (nn.Linear,)),
            ("token_mixer.attn_drop", mixer.get("attn_drop"), (nn.Dropout,)),
            ("token_mixer.proj", mixer.get("proj"), (nn.Linear,)),
            ("token_mixer.proj_drop", mixer.get("proj_drop"), (nn.Dropout,)),
            ("ls1", own["ls1"], (LayerScale,)),
            ("drop_path1", own["drop_path1"], (nn.Identity, DropPath)),
            ("norm2", own["norm2"], (nn.LayerNorm,)),
            ("mlp", own["mlp"], (Mlp,)),
            ("mlp.fc1", mlp.get("fc1"), (nn.Linear,)),
            ("mlp.act", mlp.get("act"), (ACTIVATION_MODULES[self.activation],)),
            ("mlp.drop1", mlp.get("drop1"), (nn.Dropout,)),
            ("mlp.fc2", mlp.get("fc2"), (nn.Linear,)),
            ("mlp.drop2", mlp.get("drop2"), (nn.Dropout,)),
            ("ls2", own["ls2"], (LayerScale,)),
            ("drop_path2", own["drop_path2"], (nn.Identity, DropPath)),
        )
        if reason := why_changed(parts, self.activation):
            return reason
        dropouts = (self.token_mixer.attn_drop, self.token_mixer.proj_drop, self.mlp.drop1, self.mlp.drop2)
        if is_active(*dropouts, self.drop_path1, self.drop_path2):
            return "dropout or stochastic depth is active here (training mode)"
        return None
