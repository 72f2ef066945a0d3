"""What an operation and a network cost at least: their matrix products and their traffic, against a device's ceilings.

Counted are the operations of matrix products and convolutions (two for each multiplication), and the bytes of every
input read once and every output written once. What stays inside a fused operation, such as the hidden activations of an
MLP, never reaches memory. Norms, activations and pooling are free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from ...config import EfficientFormerConfig, check_choice, check_count

OPERATIONS = (
    "pool_mixer",
    "conv_mlp",
    "meta4d",
    "bias_attention",
    "attention_mixer",
    "linear_mlp",
    "conv_norm",
    "head",
)


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at best (`effformer.bench.measure.ceilings` measures it).

    Attributes:
        flops: FLOP/s of matrix products in the dtype.
        bandwidth: bytes/s of a copy, read plus written.
    """

    flops: float
    bandwidth: float

    def floor(self, flops: float, bytes: float) -> float:
        """Seconds that so many FLOPs and bytes take at least."""
        return max(flops / self.flops, bytes / self.bandwidth)


@dataclass(frozen=True)
class Part:
    """Equal parts of a network, each computed by one fused operation.

    Attributes:
        name: such as "stage 1, 4D block".
        op: the operation, one of `OPERATIONS`.
        shape: of the operation's input.
        count: how many of them the network has.
        flops, bytes: of one.
        options: what else there is to say of the operation, as in `effformer.apps.verify.checks`.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    count: int
    flops: float
    bytes: float
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds that one of them takes at least."""
        return ceilings.floor(self.flops, self.bytes)


def cost(op: str, shape: tuple[int, ...], options: Mapping[str, Any], dtype: torch.dtype) -> tuple[float, float]:
    """(FLOPs, bytes) of one call of `effformer.ops.<op>`.

    Args:
        op: one of `OPERATIONS`.
        shape: of its input: maps [B, C, H, W], tokens [B, N, channels].
        options: "hidden" of the MLPs, "num_heads", "key_dim" and "value_dim" of attention, "outputs" of conv_norm,
            "classes" of head (None or 0: it returns the pooled features); others are not looked at.
        dtype: of input, weights and output. Vectors and the attention's bias are float32 (float64 if it is).

    Raises:
        ValueError: for an unknown operation.
    """
    check_choice("op", op, OPERATIONS)
    size = dtype.itemsize
    vector = max(size, 4)
    batch, rows = shape[0], prod(shape) // shape[1 if len(shape) == 4 else 2]
    channels = shape[1] if len(shape) == 4 else shape[2]
    maps = 2 * prod(shape) * size  # read, and written in the same shape
    match op:
        case "pool_mixer":
            return 0, maps + channels * vector
        case "conv_mlp" | "meta4d" | "linear_mlp":
            hidden = options["hidden"]
            # scale and shift of both products; the layer scale of the pooling; norm, a shift, a scale and a shift
            values = {"conv_mlp": 2 * hidden + 2 * channels, "meta4d": 2 * hidden + 3 * channels}.get(
                op, hidden + 4 * channels
            )
            return 4 * rows * channels * hidden, maps + 2 * channels * hidden * size + values * vector
        case "bias_attention" | "attention_mixer":
            heads, key, value = options["num_heads"], options["key_dim"], options["value_dim"]
            tokens = shape[1]
            attention = 2 * batch * heads * tokens**2 * (key + value)
            bias = heads * tokens**2 * vector
            if op == "bias_attention":
                return attention, rows * heads * (2 * key + 2 * value) * size + bias
            qkv, values = heads * (2 * key + value), heads * value
            weights = channels * (qkv + values)
            flops = attention + 2 * rows * weights
            return flops, maps + weights * size + bias + (qkv + 4 * channels) * vector
        case "conv_norm":
            outputs = options["outputs"]
            pixels = batch * halved(shape[2]) * halved(shape[3])
            weights = 9 * channels * outputs
            traffic = prod(shape) + weights + pixels * outputs
            return 2 * pixels * weights, traffic * size + 2 * outputs * vector
        case _:
            classes = options["classes"] or 0
            written = batch * (classes or channels)
            return 2 * batch * channels * classes, (
                (prod(shape) + channels * classes + written) * size + (2 * channels + classes) * vector
            )


def network_parts(
    config: EfficientFormerConfig,
    batch: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    in_chans: int = 3,
    num_classes: int = 1000,
) -> list[Part]:
    """The parts of a network, in their order, from images [batch, in_chans, *size] to logits (or pooled features).

    The two heads are one, whose weights are their mean; the attention's bias is read as it is expanded, [heads, N, N].
    `feature_norm` is not among the parts.

    Raises:
        ValueError: for a batch or a side below 1.
    """
    for name, value in (("batch", batch), ("size", size[0]), ("size", size[1])):
        check_count(name, value, least=1)
    parts: list[Part] = []

    def add(name: str, op: str, shape: tuple[int, ...], count: int, **options: Any) -> None:
        if count:
            parts.append(Part(name, op, shape, count, *cost(op, shape, options, dtype), options))

    height, width = size
    channels = in_chans
    for name, outputs in (("stem, 1st", config.widths[0] // 2), ("stem, 2nd", config.widths[0])):
        add(name, "conv_norm", (batch, channels, height, width), 1, outputs=outputs, activation="relu")
        channels, height, width = outputs, halved(height), halved(width)
    for stage, (depth, outputs) in enumerate(zip(config.depths, config.widths, strict=True), 1):
        if stage > 1:
            shape = (batch, channels, height, width)
            add(f"downsampling {stage - 1}", "conv_norm", shape, 1, outputs=outputs, activation=None)
            channels, height, width = outputs, halved(height), halved(width)
        num_vit = config.num_vit if stage == len(config.depths) else 0
        hidden = int(channels * config.mlp_ratio)
        add(f"stage {stage}, 4D", "meta4d", (batch, channels, height, width), depth - num_vit, hidden=hidden)
    tokens = (batch, height * width, channels)
    heads = {"num_heads": config.num_heads, "key_dim": config.key_dim, "value_dim": config.value_dim}
    add("stage 4, attention", "attention_mixer", tokens, config.num_vit, **heads)
    add("stage 4, MLP", "linear_mlp", tokens, config.num_vit, hidden=hidden)
    add("head", "head", tokens, 1, classes=num_classes)
    return parts


def network_floor(
    config: EfficientFormerConfig,
    batch: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    ceilings: Ceilings,
    in_chans: int = 3,
    num_classes: int = 1000,
) -> float:
    """Seconds that a forward takes at least: the sum over `network_parts`."""
    parts = network_parts(config, batch, size, dtype, in_chans, num_classes)
    return sum(part.count * part.floor(ceilings) for part in parts)


def halved(side: int) -> int:
    """The side of a map after a 3x3 convolution of stride 2 with padding 1."""
    return (side + 1) // 2
