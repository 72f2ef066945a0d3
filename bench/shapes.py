"""The launches of the published networks, described and not run: what is audited, tuned and measured."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..config import PRESETS
from ..kernels.attention_mixer import attention_mixer_launches
from ..kernels.bias_attention import bias_attention_launch, new_values
from ..kernels.conv_mlp import conv_mlp_launches
from ..kernels.device import Device, stand_in
from ..kernels.head import head_launches, new_logits
from ..kernels.launch import Launch
from ..kernels.layer_norm import layer_norm_launch
from ..kernels.layout import token_rows
from ..kernels.linear_mlp import linear_mlp_launches
from ..kernels.meta4d import meta4d_launches
from ..kernels.pool_mixer import pool_mixer_launch


def network_launches(
    name: str, dtype: torch.dtype, device: Device, *, batch: int = 256, size: tuple[int, int] = (224, 224)
) -> Iterator[tuple[str, str, Launch]]:
    """(operation, shape, launch) of all fused operations at each stage of a published network; nothing is allocated.

    channels_last maps of [batch, C, height / 4, width / 4] and smaller, on `device`. At the stage of the 3D blocks
    `bias_attention` is part of `attention_mixer`, and not repeated.
    """
    config = PRESETS[name]
    with stand_in(device):
        for stage, width in enumerate(config.widths):
            height, columns = (-(-side // (4 << stage)) for side in size)  # 3x3, stride 2, padding 1: rounded up
            hidden = int(width * config.mlp_ratio)
            yield from map_launches(width, hidden, (batch, height, columns), dtype, config.act)
        heads = (config.num_heads, config.key_dim, config.value_dim)
        yield from token_launches(batch, height * columns, width, hidden, *heads, dtype)
        yield from end_launches(batch, height * columns, width, 1000, dtype)


def map_launches(
    channels: int, hidden: int, size: tuple[int, int, int], dtype: torch.dtype, activation: str = "gelu"
) -> Iterator[tuple[str, str, Launch]]:
    """`network_launches` for maps [batch, channels, height, width], with size = (batch, height, width)."""
    batch, height, width = size
    x = _empty(batch, height, width, channels, of=dtype).permute(0, 3, 1, 2)
    w1, w2 = _empty(hidden, channels, of=dtype), _empty(channels, hidden, of=dtype)
    c, h, out = _empty(channels), _empty(hidden), torch.empty_like(x)
    shape = f"[{batch}, {channels}, {height}, {width}]"
    for launch in meta4d_launches(x, c, w1, h, h, w2, c, c, activation, out=out):
        yield "meta4d", shape, launch
    for launch in conv_mlp_launches(x, w1, h, h, w2, c, c, activation, out=out):
        yield "conv_mlp", shape, launch
    yield "pool_mixer", shape, pool_mixer_launch(x, c, out)


def token_launches(
    batch: int, tokens: int, channels: int, hidden: int, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> Iterator[tuple[str, str, Launch]]:
    """`network_launches` for tokens [batch, tokens, channels]."""
    x, c, h = _empty(batch, tokens, channels, of=dtype), _empty(channels), _empty(hidden)
    qkv, values = heads * (2 * key_dim + value_dim), heads * value_dim
    weights = _empty(qkv, channels, of=dtype), _empty(channels, values, of=dtype)
    bias, out = _empty(heads, tokens, tokens), torch.empty_like(x)
    shape = f"[{batch}, {tokens}, {channels}]"
    arguments = (c, c, weights[0], _empty(qkv), bias, weights[1], c, c)
    for launch in attention_mixer_launches(x, *arguments, heads, key_dim, 1e-5, out=out):
        yield "attention_mixer", shape, launch
    w1, w2 = _empty(hidden, channels, of=dtype), _empty(channels, hidden, of=dtype)
    for launch in linear_mlp_launches(x, c, c, w1, h, w2, c, c, "gelu", 1e-5, out=out):
        yield "linear_mlp", shape, launch


def end_launches(
    batch: int, tokens: int, channels: int, classes: int | None, dtype: torch.dtype
) -> Iterator[tuple[str, str, Launch]]:
    """`network_launches` for the network's end."""
    x, c = _empty(batch, tokens, channels, of=dtype), _empty(channels)
    weight, bias = (None, None) if classes is None else (_empty(classes, channels, of=dtype), _empty(classes))
    for launch in head_launches(x, c, c, weight, bias, 1e-5, out=new_logits(x, weight)):
        yield "head", f"[{batch}, {tokens}, {channels}]", launch


def unusual_launches(dtype: torch.dtype, device: Device) -> Iterator[tuple[str, str, Launch]]:
    """What no published network has and the table has entries for: narrow and odd channels, wide or few tokens."""
    with stand_in(device):
        for channels in (24, 80):
            yield from map_launches(channels, 4 * channels, (8, 28, 28), dtype)
        contiguous = _empty(8, 48, 28, 28, of=dtype)
        yield "pool_mixer", "[8, 48, 28, 28], contiguous", pool_mixer_launch(contiguous, _empty(48), contiguous)
        tokens_of_8192 = token_rows(_empty(8, 49, 8192, of=dtype))
        norm = layer_norm_launch(tokens_of_8192, _empty(8192), _empty(8192), 1e-5, tokens_of_8192)
        yield "layer_norm", "[8, 49, 8192]", norm
        yield from end_launches(8, 49, 8192, None, dtype)
        for tokens, key, value in ((12, 32, 128), (12, 48, 160), (49, 48, 160), (49, 320, 32)):
            qkv, bias = _empty(8, tokens, 8 * (2 * key + value), of=dtype), _empty(8, tokens, tokens)
            launch = bias_attention_launch(qkv, bias, 8, key, new_values(qkv, 8, key))
            yield "bias_attention", f"[8, {tokens}, 8 * (2 * {key} + {value})]", launch


def _empty(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=of, device="meta")
