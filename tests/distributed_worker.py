"""One of two processes that train together; test_training.py starts them and checks the results.

    python distributed_worker.py RANK FOLDER

FOLDER/RANK.pt gets, for each wrapper, parameters and buffers after training, and the wrapped network's results.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from effformer import EfficientFormer, EfficientFormerConfig
from effformer.testing import randomise

STEPS = 20
RANKS = 2


def network() -> EfficientFormer:
    """A small one of every kind of part, in float64, in training, the same in each process."""
    config = EfficientFormerConfig(depths=(1, 1, 2, 2), widths=(8, 12, 16, 24), num_vit=1, num_heads=2, key_dim=4)
    model = EfficientFormer(config, num_classes=10, dtype=torch.float64)
    randomise(model).train()
    return model


def batches(rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A rank's images and labels, step by step."""
    generator = torch.Generator().manual_seed(100 + rank)
    for _ in range(STEPS):
        x = torch.randn(3, 3, 64, 48, dtype=torch.float64, generator=generator)
        yield x, torch.randint(10, (3,), generator=generator)


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def probe() -> Tensor:
    return torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def train(model: nn.Module, rank: int) -> None:
    steps = optimiser(model)
    for x, labels in batches(rank):
        steps.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        steps.step()


@torch.no_grad()
def evaluate(model: nn.Module) -> Tensor:
    logits: Tensor = model.eval()(probe())
    return logits


def distributed_data_parallel(rank: int) -> dict[str, Any]:
    model = DistributedDataParallel(network())
    train(model, rank)
    return {"state": model.module.state_dict(), "logits": evaluate(model)}


def fully_sharded(rank: int, wrap: Callable[[nn.Module], None]) -> dict[str, Any]:
    model = network()
    wrap(model)
    register_fsdp_forward_method(model, "forward_intermediates")
    train(model, rank)
    logits = evaluate(model)
    with torch.no_grad():
        maps = model.forward_intermediates(probe(), intermediates_only=True)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
    state = copy.deepcopy(get_model_state_dict(model, options=options))
    parts = sum(p.to_local().numel() for p in model.parameters())  # type: ignore[attr-defined]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {"state": state, "buffers": buffers, "logits": logits, "maps": maps, "parameters": parts}


def by_block(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    for stage in model.stages:
        for block in stage.blocks:
            if any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def by_layer(model: nn.Module) -> None:
    """Shard below block level: the fused operations of a block would read weights that are not there."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for module in [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    results = {
        "ddp": distributed_data_parallel(rank),
        "fsdp": fully_sharded(rank, by_block),
        "layers": fully_sharded(rank, by_layer),
    }
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
