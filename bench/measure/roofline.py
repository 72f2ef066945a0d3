"""The least time of an operation and of a network: matrix products and memory traffic, at the ceilings of a device.

FLOPs are those of matrix products and convolutions, two for each multiplication. Traffic is every input read once and
every output written once. Tensors inside a fused operation, such as the hidden activations of an MLP, never reach
memory. Norms, activations and pooling are free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ...config import EfficientFormerConfig
from ...testing import draw_case
from ...workload import Work, network_work


@dataclass(frozen=True)
class Ceilings:
    """The most that a device reaches (`effformer.bench.measure.ceilings` measures it).

    Attributes:
        flops: FLOP/s of matrix products in the dtype.
        bandwidth: bytes/s of a copy, read plus written.
    """

    flops: float
    bandwidth: float

    def least_time(self, flops: float, bytes: float) -> float:
        """Seconds that so many FLOPs and bytes take at least."""
        return max(flops / self.flops, bytes / self.bandwidth)


def cost(op: str, shape: tuple[int, ...], options: Mapping[str, Any], dtype: torch.dtype) -> tuple[int, int]:
    """(FLOPs, bytes) of one call of `effformer.ops.<op>`, counted on the meta device.

    Args:
        op: one of `effformer.workload.OPERATIONS`.
        shape: of its input.
        options: as in `effformer.workload.Work`.
        dtype: of input, weights and output: float32 or one of 16 bits. Vectors and the attention's bias are float32.

    Raises:
        ValueError: for an unknown operation.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        case = draw_case(op, shape, dtype, **options)
        out = case.run("eager")
    return counter.get_total_flops(), sum(tensor.nbytes for tensor in (*case.arguments, out))


def network_parts(
    config: EfficientFormerConfig, batch_size: int, size: tuple[int, int], dtype: torch.dtype
) -> list[tuple[Work, tuple[int, int]]]:
    """The parts of a network in its order: `effformer.workload.network_work`, with FLOPs and bytes of one call of each.

    The attention's bias is read as it is expanded, [heads, N, N].

    Raises:
        ValueError: for a batch size or a side below 1.
    """
    works = [work for work in network_work(config, batch_size, size) if work.count]
    return [(work, cost(work.operation, work.shape, work.options, dtype)) for work in works]


def network_least_time(
    config: EfficientFormerConfig, batch_size: int, size: tuple[int, int], dtype: torch.dtype, ceilings: Ceilings
) -> float:
    """Seconds that a forward takes at least: the sum over `network_parts`."""
    parts = network_parts(config, batch_size, size, dtype)
    return sum(work.count * ceilings.least_time(*amounts) for work, amounts in parts)
