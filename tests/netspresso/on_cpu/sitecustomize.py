"""Make the real NetsPresso Trainer train on a CPU in several processes: it is written for NCCL and GPUs.

Python imports this module by itself in every process that has the folder in PYTHONPATH.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def _prepare() -> None:
    from effformer.bench.measure.timm_model import import_torchvision

    import_torchvision()
    import netspresso_trainer.models.builder as builder
    import netspresso_trainer.trainer_common as common
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    def set_device(seed: int) -> tuple[bool, int, int, torch.device]:
        torch.manual_seed(seed)
        dist.init_process_group("gloo")
        return True, dist.get_world_size(), dist.get_rank(), torch.device("cpu")

    def wrap(model: torch.nn.Module, device_ids: Any, **options: Any) -> DistributedDataParallel:
        return DistributedDataParallel(model, **options)

    common.set_device = set_device
    builder.DDP = wrap


if "effformer.netspresso" in " ".join(sys.orig_argv) and "torch.distributed.run" not in sys.orig_argv:
    if "LOCAL_RANK" in os.environ:
        _prepare()
    else:
        from effformer.bench.measure.timm_model import import_torchvision

        import_torchvision()
