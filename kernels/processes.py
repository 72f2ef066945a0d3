"""Statistics and sums over all processes of a group, which share the batch of a SyncBatchNorm.

Operators take a group by its name; "" is this process alone. All processes must call in the same order.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .statistics import merged


def merged_statistics(count: int, mean: Tensor, var: Tensor, group: str) -> tuple[Tensor | int, Tensor, Tensor]:
    """Number of rows, mean and variance [C] of all processes, from those of each; float64."""
    if not group:
        return count, mean, var
    own = torch.cat([mean.new_tensor([count]), mean, var])
    every = own.new_empty(_size(group), len(own))
    dist.all_gather_into_tensor(every, own[None], group=_group(group))
    counts, means, variances = every[:, 0], *every[:, 1:].chunk(2, dim=1)
    return counts.sum(), *merged(counts, means, variances * counts[:, None])


def summed(one: Tensor, other: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """The sums of two vectors of one length over all processes."""
    if not group:
        return one, other
    both = torch.stack([one, other])
    dist.all_reduce(both, group=_group(group))
    return both[0], both[1]


def _group(name: str) -> dist.ProcessGroup:
    found: dist.ProcessGroup = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]
    return found


def _size(name: str) -> int:
    return dist.get_world_size(_group(name))
