"""The fused operations of a network: which there are, at which shapes, and how many of each.

`effformer verify`, the benchmarks, the tuner and the audit all follow this one description. This module imports neither
PyTorch nor Triton.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .checks import check_count
from .config import EfficientFormerConfig

# The fused operations (functions of `effformer.ops`) in the order of all tables, and the input of each: a "map"
# [B, C, H, W], "tokens" [B, N, C], or "qkv" [B, N, channels of all queries, keys and values].
# `effformer.testing.<operation>_case` gives each its arguments.
OPERATIONS = {
    "pool_mixer": "map",
    "conv_mlp": "map",
    "meta4d": "map",
    "conv_norm": "map",
    "bias_attention": "qkv",
    "attention_mixer": "tokens",
    "linear_mlp": "tokens",
    "head": "tokens",
}
# Those whose gradients kernels compute.
DIFFERENTIABLE = ("pool_mixer", "conv_mlp", "meta4d", "bias_attention", "attention_mixer", "linear_mlp")


@dataclass(frozen=True)
class Work:
    """Equal calls of one fused operation in a network.

    Attributes:
        part: the part of the network, such as "downsampling 1" or "stage 3, 4D".
        where: its "stem", or the "stage" 1 to 4.
        operation: one of `OPERATIONS`.
        shape: of the operation's input.
        count: calls in one forward. 0 for an operation that runs as a step of another one in the same place.
        options: what else to know: "outputs" and "activation" of conv_norm, "hidden" of the MLPs, "num_heads",
            "key_dim" and "value_dim" of attention, "classes" of head (None: it returns the pooled features).
    """

    part: str
    where: str
    operation: str
    shape: tuple[int, ...]
    count: int
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)


def network_work(
    config: EfficientFormerConfig,
    batch_size: int,
    size: tuple[int, int],
    in_chans: int = 3,
    num_classes: int | None = 1000,
) -> Iterator[Work]:
    """The work of a network in its order, from images [batch_size, in_chans, *size] to logits or pooled features.

    The two heads are one, whose weights are their mean. `feature_norm` is not included.

    Args:
        config: of the network.
        batch_size: images, 1 or more.
        size: height and width of the images, 1 or more.
        in_chans: channels of the images.
        num_classes: None or 0 for the pooled features.

    Raises:
        ValueError: for a batch size or a side below 1.
    """
    for name, value in (("batch_size", batch_size), ("size", size[0]), ("size", size[1])):
        check_count(name, value, least=1)
    channels, (height, width) = in_chans, size
    for part, outputs in (("stem, 1st", config.widths[0] // 2), ("stem, 2nd", config.widths[0])):
        convolution: dict[str, Any] = {"outputs": outputs, "activation": "relu"}
        yield Work(part, "stem", "conv_norm", (batch_size, channels, height, width), 1, convolution)
        channels, height, width = outputs, halved(height), halved(width)
    for stage, (depth, outputs) in enumerate(zip(config.depths, config.widths, strict=True), 1):
        where = f"stage {stage}"
        if stage > 1:
            convolution = {"outputs": outputs, "activation": None}
            shape = batch_size, channels, height, width
            yield Work(f"downsampling {stage - 1}", where, "conv_norm", shape, 1, convolution)
            channels, height, width = outputs, halved(height), halved(width)
        num_vit = config.num_vit if stage == len(config.depths) else 0
        mlp: dict[str, Any] = {"hidden": int(channels * config.mlp_ratio)}
        if config.act != "gelu":
            mlp["activation"] = config.act
        if depth > num_vit:
            shape = batch_size, channels, height, width
            yield Work(f"{where}, 4D", where, "meta4d", shape, depth - num_vit, mlp)
            yield Work(f"{where}, 4D", where, "conv_mlp", shape, 0, mlp)
            yield Work(f"{where}, 4D", where, "pool_mixer", shape, 0)
        tokens = batch_size, height * width
        if num_vit:
            heads = {"num_heads": config.num_heads, "key_dim": config.key_dim, "value_dim": config.value_dim}
            qkv = config.num_heads * (2 * config.key_dim + config.value_dim)
            yield Work(f"{where}, attention", where, "attention_mixer", (*tokens, channels), num_vit, heads)
            yield Work(f"{where}, attention", where, "bias_attention", (*tokens, qkv), 0, heads)
            yield Work(f"{where}, MLP", where, "linear_mlp", (*tokens, channels), num_vit, mlp)
    yield Work("head", where, "head", (*tokens, channels), 1, {"classes": num_classes or None})


def halved(side: int) -> int:
    """The side of a map after a 3x3 convolution of stride 2 with padding 1."""
    return (side + 1) // 2
