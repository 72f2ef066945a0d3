"""The calls of the fused operations in L1, L3 and L7 at 224x224, and of L1's attention at 512x640.

A rehearsal on a CPU has the same kinds of calls with tiny tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from machine import REHEARSED, same

from effformer import EfficientFormer, EfficientFormerConfig, create_model
from effformer.config import PRESETS
from effformer.testing import Case, draw_case, randomise
from effformer.workload import OPERATIONS, network_work

MODELS = ["efficientformer_l1"] if REHEARSED else list(PRESETS)
NARROW = {"depths": (1, 1, 1, 2), "widths": (16, 24, 32, 40), "num_heads": 2, "key_dim": 8} if REHEARSED else {}
HEADS = (
    {"num_heads": 2, "key_dim": 8, "value_dim": 24} if REHEARSED else {"num_heads": 8, "key_dim": 32, "value_dim": 128}
)


@dataclass(frozen=True)
class Work:
    """An operation at a size: `shape` is that of one image."""

    operation: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(hash=False)

    def __str__(self) -> str:
        outputs = f"-to-{self.options['outputs']}" if self.operation == "conv_norm" else ""
        return f"{self.operation}-{'x'.join(map(str, self.shape))}{outputs}"

    @property
    def fills(self) -> int:
        """A batch that occupies a large GPU several times over."""
        rows = self.shape[0] if len(self.shape) == 2 else self.shape[1] * self.shape[2]
        return 2 if REHEARSED else max(8, min(512, 50_000 // rows))

    def case(self, batch: int, dtype: torch.dtype) -> Case:
        """Random arguments."""
        return draw_case(self.operation, (batch, *self.shape), dtype, **self.options)


def _works() -> Iterator[Work]:
    """The work of networks at a size: with maps, with tokens, or both."""
    if REHEARSED:
        # 4D blocks of one kernel, and of two, or three in float32; attention with one tile of keys, and with two.
        widths = 48, 232, 24, 40
        narrow = EfficientFormerConfig(
            depths=(1, 1, 1, 1), widths=widths, num_vit=1, num_heads=2, key_dim=8, value_ratio=3
        )
        networks = [(narrow, (24, 20), (4,)), (narrow, (96, 160), (3,)), (narrow, (224, 320), (3,))]
    else:
        networks = [(config, (224, 224), (4, 3)) for config in PRESETS.values()]
        networks.append((PRESETS["efficientformer_l1"], (512, 640), (3,)))
    for config, size, dimensions in networks:
        for work in network_work(config, 1, size, num_classes=70 if REHEARSED else 1000):
            if len(work.shape) in dimensions:
                yield Work(work.operation, work.shape[1:], dict(work.options))


# By operation; the first is the narrowest, most often fused, and the last has the most channels, or tokens.
WORKS = sorted(dict.fromkeys(_works()), key=lambda work: ([*OPERATIONS].index(work.operation), work.shape))


def network(name: str, dtype: torch.dtype, backend: str, **options: Any) -> EfficientFormer:
    """A published model (rehearsed, a narrow one) with randomised weights, in eval mode."""
    return randomise(create_model(name, dtype=dtype, backend=backend, **options, **NARROW), seed=1).eval()


def same_on_streams(forward: Callable[[torch.Tensor], torch.Tensor], given: Sequence[torch.Tensor]) -> None:
    """Ten calls of `forward` on each of several streams at once give the bits of calls on one."""
    expected = [forward(x) for x in given]
    streams = [torch.cuda.Stream() for _ in given]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[] for _ in given]
    for _ in range(10):
        for stream, x, kept in zip(streams, given, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(forward(x))
    torch.cuda.synchronize()
    for kept, one in zip(results, expected, strict=True):
        for found in kept:
            same(found, one)
