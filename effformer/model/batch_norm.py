"""The running statistics of a BatchNorm whose batch statistics a fused operation computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..reference import upcast


@torch.no_grad()
def move_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Move the running statistics as the module's own forward would.

    Args:
        norm: nothing happens in eval mode, or if it tracks none.
        mean, var: of the batch, [C]; the variance divided by `count`.
        count: values a channel.
    """
    if not (norm.training and norm.track_running_stats):
        return
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:  # the average of all batches
        momentum = 1.0 / float(norm.num_batches_tracked)
    for running, of_batch in ((norm.running_mean, mean), (norm.running_var, var * (count / (count - 1)))):
        if running is not None:
            running.copy_(upcast(running).lerp(of_batch, momentum))
