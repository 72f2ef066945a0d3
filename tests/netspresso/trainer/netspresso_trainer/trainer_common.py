"""A step of training, or none, in place of the trainer's; each process writes what it built and holds to a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .models.registry import MODEL_BACKBONE_DICT


def train_common(conf: Any, logging_dir: Path, steps: int = 1, **_: Any) -> None:
    torch.manual_seed(conf.environment.seed)
    if distributed := "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if distributed else 0
    architecture = conf.model.architecture
    backbone = MODEL_BACKBONE_DICT[architecture.backbone.name](
        task=conf.model.task, conf_model_backbone=architecture.backbone
    )
    model: nn.Module = DistributedDataParallel(backbone) if distributed else backbone
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(rank))
    for _step in range(steps):
        model(images)["last_feature"].square().sum().backward()
        optimiser.step()
    record = {"backbone": type(backbone).__module__, "parameters": [p.sum().item() for p in backbone.parameters()]}
    (logging_dir / f"rank{rank}.json").write_text(json.dumps(record))
    if distributed:
        dist.destroy_process_group()
