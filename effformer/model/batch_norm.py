"""BatchNorm whose batch statistics a fused operation computes: its running statistics, the processes that share it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..reference import upcast


@torch.no_grad()
def move_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: Tensor | int) -> None:
    """Move the running statistics as the module's own forward would.

    Args:
        norm: nothing happens in eval mode, or if it tracks none.
        mean, var: of the batch, [C]; the variance divided by `count`.
        count: values a channel, as a number or a tensor [1].
    """
    if not (norm.training and norm.track_running_stats):
        return
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:  # the average of all batches
        assert norm.num_batches_tracked is not None
        momentum = 1.0 / float(norm.num_batches_tracked)
    unbiased = (var * (count / (count - 1))).to(var.dtype)
    for running, of_batch in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        if running is not None:
            running.copy_(upcast(running).lerp(of_batch, momentum))


def group_of(norm: nn.Module) -> dist.ProcessGroup | None:
    """The processes that share a BatchNorm's batch statistics; None for this one alone."""
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training and dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None
