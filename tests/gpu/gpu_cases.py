"""The calls of the fused operations in L1, L3 and L7 at 224x224, and of L1's attention at 512x640.

Rehearsed on a CPU: as many kinds of calls, tiny.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from machine import REHEARSED

from effformer import EfficientFormer, create_model
from effformer.config import PRESETS
from effformer.testing import (
    Case,
    attention_mixer_case,
    bias_attention_case,
    conv_mlp_case,
    conv_norm_case,
    draw_map,
    head_case,
    linear_mlp_case,
    meta4d_case,
    pool_mixer_case,
    randomise,
)

MODELS = ["efficientformer_l1"] if REHEARSED else list(PRESETS)
NARROW = {"depths": (1, 1, 1, 2), "widths": (16, 24, 32, 40), "num_heads": 2, "key_dim": 8} if REHEARSED else {}
HEADS = (
    {"num_heads": 2, "key_dim": 8, "value_dim": 24} if REHEARSED else {"num_heads": 8, "key_dim": 32, "value_dim": 128}
)


@dataclass(frozen=True)
class Work:
    """An operation at a size: a map [batch, channels, height, width] or tokens [batch, height * width, channels].

    `fills`: a batch that occupies a large GPU several times over.
    """

    operation: str
    channels: int
    height: int
    width: int
    fills: int

    def __str__(self) -> str:
        return f"{self.operation}-{self.channels}x{self.height}x{self.width}"

    def case(self, batch: int, dtype: torch.dtype) -> Case:
        """Drawn arguments."""
        if self.operation in MAPS:
            x = draw_map((batch, self.channels, self.height, self.width), dtype)
            match self.operation:
                case "pool_mixer":
                    return pool_mixer_case(x)
                case "conv_norm":
                    outputs = {3: 24}.get(self.channels, 2 * self.channels)
                    return conv_norm_case(x, outputs, "relu" if self.channels <= 48 else None)
                case "conv_mlp":
                    return conv_mlp_case(x, 4 * self.channels)
            return meta4d_case(x, 4 * self.channels)
        tokens = self.height * self.width
        match self.operation:
            case "bias_attention":
                return bias_attention_case(batch, tokens, dtype, **HEADS)
            case "attention_mixer":
                return attention_mixer_case(torch.randn(batch, tokens, self.channels).to(dtype), **HEADS)
            case "head":
                return head_case(torch.randn(batch, tokens, self.channels).to(dtype), 70 if REHEARSED else 1000)
        return linear_mlp_case(torch.randn(batch, tokens, self.channels).to(dtype), 4 * self.channels)


MAPS = ("pool_mixer", "conv_mlp", "meta4d", "conv_norm")
TOKENS = ("attention_mixer", "linear_mlp", "head")


def _works() -> list[Work]:
    if REHEARSED:
        maps = [(48, 6, 5, 2), (232, 3, 3, 2)]  # one kernel; two, or three in float32
        tokens = [(40, 3, 5, 2)]
        attention = [(0, 3, 5, 2), (0, 7, 10, 2)]  # one tile of keys; two
    else:
        fills = (32, 64, 128, 512)
        maps = [
            (channels, 56 >> stage, 56 >> stage, fills[stage])
            for config in PRESETS.values()
            for stage, channels in enumerate(config.widths)
        ]
        tokens = [(config.widths[-1], 7, 7, 512) for config in PRESETS.values()]
        attention = [(0, 7, 7, 512), (0, 16, 20, 64)]
        tokens.append((PRESETS["efficientformer_l1"].widths[-1], 16, 20, 64))
    # The stem's two convolutions and the downsamplings.
    halved = [(3, 9, 7, 2), (24, 9, 7, 2)] if REHEARSED else [(3, 224, 224, 8), (24, 112, 112, 16), (48, 112, 112, 16)]
    if not REHEARSED:
        halved += [(channels, height, width, fills) for channels, height, width, fills in maps if height > 7]
    return [
        *(Work(operation, *sizes) for operation in MAPS if operation != "conv_norm" for sizes in maps),
        *(Work("conv_norm", *sizes) for sizes in halved),
        *(Work("bias_attention", *sizes) for sizes in attention),
        *(Work(operation, *sizes) for operation in TOKENS for sizes in tokens),
    ]


WORKS = _works()


def network(name: str, dtype: torch.dtype, backend: str, **options: Any) -> EfficientFormer:
    """A published model (rehearsed, a narrow one) with randomised weights, in eval mode."""
    return randomise(create_model(name, dtype=dtype, backend=backend, **options, **NARROW), seed=1).eval()
