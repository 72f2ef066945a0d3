"""Statistics and sums of all processes of a group, for a BatchNorm whose batch is spread over them.

A group is known by its name, which an operator can take; "" is this process alone. All processes call in one order.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def merged_statistics(count: int, mean: Tensor, var: Tensor, group: str) -> tuple[Tensor | int, Tensor, Tensor]:
    """Number of rows, mean and variance [C] of all processes, from those of each; float64."""
    if not group:
        return count, mean, var
    own = torch.cat([mean.new_tensor([count]), mean, var])
    every = own.new_empty(_size(group), len(own))
    dist.all_gather_into_tensor(every, own[None], group=_group(group))
    counts, means, variances = every[:, :1], *every[:, 1:].chunk(2, dim=1)
    total = counts.sum()
    middle = (means * counts).sum(0) / total
    return total, middle, ((variances + (means - middle).square()) * counts).sum(0) / total


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
