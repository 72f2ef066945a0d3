"""The launches of the published networks, described and not run: what is audited, tuned and measured."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...config import PRESETS
from ...kernels.attention_mixer import attention_mixer_launches
from ...kernels.bias_attention import bias_attention_launch, new_values, prepare_bias
from ...kernels.conv_mlp import conv_mlp_launches
from ...kernels.conv_norm import conv_norm_launches, new_halved
from ...kernels.head import head_launches, new_logits
from ...kernels.launch import Launch
from ...kernels.layer_norm import layer_norm_launch
from ...kernels.layout import token_rows
from ...kernels.linear_mlp import linear_mlp_launches
from ...kernels.meta4d import meta4d_launches
from ...kernels.pool_mixer import pool_mixer_launch
from ...kernels.tiling.device import Device, stand_in


def network_launches(
    name: str, dtype: torch.dtype, device: Device, *, batch: int = 256, size: tuple[int, int] = (224, 224)
) -> Iterator[tuple[str, str, Launch]]:
    """(operation, shape, launch) of all fused operations at each stage of a published network; nothing is allocated.

    channels_last maps of [batch, C, height / 4, width / 4] and smaller, on `device`. At the stage of the 3D blocks
    `bias_attention` is part of `attention_mixer`, and repeated with a prepared bias alone.
    """
    config = PRESETS[name]
    with stand_in(device):
        for stage, width in enumerate(config.widths):
            height, columns = (-(-side // (4 << stage)) for side in size)  # 3x3, stride 2, padding 1: rounded up
            hidden = int(width * config.mlp_ratio)
            yield from map_launches(width, hidden, (batch, height, columns), dtype, config.act)
            if stage:
                double = (batch, *(-(-side // (2 << stage)) for side in size))
                yield from halving_launches(config.widths[stage - 1], width, double, dtype)
            else:
                yield from halving_launches(3, width // 2, (batch, *size), dtype, "relu")
                yield from halving_launches(3, width // 2, (batch, *size), dtype, "relu", pixels=True)
                yield from halving_launches(
                    width // 2, width, (batch, *(-(-side // 2) for side in size)), dtype, "relu"
                )
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


def halving_launches(
    channels: int,
    outputs: int,
    size: tuple[int, ...],
    dtype: torch.dtype,
    activation: str | None = None,
    *,
    pixels: bool = False,
) -> Iterator[tuple[str, str, Launch]]:
    """`network_launches` for a convolution of maps [batch, channels, height, width]; size = (batch, height, width).

    Images, of 3 channels, are contiguous, and `pixels` (uint8) [batch, height, width, channels]: both as they come.
    """
    batch, height, width = size
    x = _empty(batch, height, width, channels, of=torch.uint8 if pixels else dtype).permute(0, 3, 1, 2)
    if channels == 3 and not pixels:
        x = x.contiguous()
    weight = _empty(outputs, 3, 3, channels, of=dtype).permute(0, 3, 1, 2)
    o, border, out = _empty(outputs), _empty(channels, of=dtype) if pixels else None, new_halved(x, weight)
    shape = f"[{batch}, {channels}, {height}, {width}]" + (", uint8" if pixels else "")
    for launch in conv_norm_launches(x, weight, o, o, activation, border, out=out):
        yield "conv_norm", shape, launch


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
    yield prepared_launch(batch, tokens, heads, key_dim, value_dim, dtype)
    w1, w2 = _empty(hidden, channels, of=dtype), _empty(channels, hidden, of=dtype)
    for launch in linear_mlp_launches(x, c, c, w1, h, w2, c, c, "gelu", 1e-5, out=out):
        yield "linear_mlp", shape, launch


def prepared_launch(
    batch: int, tokens: int, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> tuple[str, str, Launch]:
    """`network_launches` for attention with a prepared bias."""
    qkv = _empty(batch, tokens, heads * (2 * key_dim + value_dim), of=dtype)
    bias = prepare_bias(_empty(heads, tokens, tokens), key_dim, value_dim, dtype)
    launch = bias_attention_launch(qkv, bias, heads, key_dim, new_values(qkv, heads, key_dim), prepared=True)
    return "bias_attention", f"[{batch}, {tokens}, {qkv.shape[2]}], prepared", launch


def end_launches(
    batch: int, tokens: int, channels: int, classes: int | None, dtype: torch.dtype
) -> Iterator[tuple[str, str, Launch]]:
    """`network_launches` for the network's end."""
    x, c = _empty(batch, tokens, channels, of=dtype), _empty(channels)
    weight, bias = (None, None) if classes is None else (_empty(classes, channels, of=dtype), _empty(classes))
    for launch in head_launches(x, c, c, weight, bias, 1e-5, out=new_logits(x, weight)):
        yield "head", f"[{batch}, {tokens}, {channels}]", launch


def unusual_launches(dtype: torch.dtype, device: Device) -> Iterator[tuple[str, str, Launch]]:
    """What no published network has and the table has entries for: odd channels, wide or few tokens, mixed dtypes."""
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
            yield prepared_launch(8, tokens, 8, key, value, dtype)
        if dtype == torch.float32:  # as under autocast: few rows, whose products alone are in 16 bit
            for batch in (1, 8):
                x, c, h = _empty(batch, 49, 448), _empty(448), _empty(1792)
                w1, w2 = _empty(1792, 448, of=torch.float16), _empty(448, 1792, of=torch.float16)
                for launch in linear_mlp_launches(x, c, c, w1, h, w2, c, c, "gelu", 1e-5, out=x):
                    yield "linear_mlp", f"[{batch}, 49, 448], weights in float16", launch
            yield from few_rows_launches(512, (2, 7, 7), dtype, weights=torch.float16)
        else:
            for channels, size in ((224, (1, 14, 14)), (448, (8, 7, 7)), (512, (2, 7, 7)), (768, (1, 7, 7))):
                yield from few_rows_launches(channels, size, dtype, weights=dtype, deterministic=False)


def few_rows_launches(
    channels: int, size: tuple[int, int, int], dtype: torch.dtype, *, weights: torch.dtype, deterministic: bool = True
) -> Iterator[tuple[str, str, Launch]]:
    """Of a 4D block, with size = (batch, height, width), in ways that the networks do not take by themselves."""
    batch, height, width = size
    x = _empty(batch, height, width, channels, of=dtype).permute(0, 3, 1, 2)
    c, h, out = _empty(channels), _empty(4 * channels), torch.empty_like(x)
    w1, w2 = _empty(4 * channels, channels, of=weights), _empty(channels, 4 * channels, of=weights)
    how = "in any order" if not deterministic else f"weights in {str(weights).removeprefix('torch.')}"
    launches = meta4d_launches(x, c, w1, h, h, w2, c, c, "gelu", deterministic=deterministic, out=out)
    for launch in launches:
        yield "meta4d", f"[{batch}, {channels}, {height}, {width}], {how}", launch


def _empty(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=of, device="meta")
