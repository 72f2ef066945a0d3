"""One of two processes that train on the kernels together; `test_train_networks.py` starts them.

    python sync_worker.py RANK FOLDER

FOLDER/RANK.pt gets results, gradients and buffers: of a block whose BatchNorms share their statistics ("sync"), and of
a network as DistributedDataParallel ("ddp") and FSDP2 by blocks ("fsdp") train it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import effformer
from effformer.testing import float32_as_such, randomise

SHARES = (2, 3)  # images of each process


def block() -> nn.Module:
    """A 4D block in training with stochastic depth left out, the same in each process."""
    network = effformer.create_model(
        "efficientformer_l1", depths=(1, 1, 1, 1), num_vit=0, num_classes=0, widths=(16, 32, 48, 64), backend="triton"
    )
    found: nn.Module = randomise(network).train().stages[0].blocks[0]
    return found


def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sum(SHARES), 16, 6, 7, generator=generator) + 2.0


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Result, gradients of a sum over the images, and buffers."""
    x = x.requires_grad_()
    with float32_as_such():
        result = model(x)
        (result * torch.linspace(-1, 1, 16)[:, None, None]).sin().sum().backward()
    gradients = {f"gradient of {name}": one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {"result": result.detach(), "x": x.grad, **gradients, **dict(model.named_buffers())}  # type: ignore[dict-item]


def network() -> nn.Module:
    """Of 4D and 3D blocks in training, the same in each process."""
    widths = {"depths": (1, 1, 1, 2), "widths": (16, 32, 48, 64)}
    model = effformer.create_model("efficientformer_l1", num_classes=5, **widths, backend="triton")
    return randomise(model).train()


def gradients(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """Of the loss on this process's images, as the wrapper around the network combines them."""
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(10 + rank))
    with float32_as_such():
        result = model(x)
        (result[0] if isinstance(result, tuple) else result).square().mean().backward()
    found = {}
    for name, one in model.named_parameters():
        if (grad := one.grad) is not None:
            found[name.removeprefix("module.")] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def sharded() -> nn.Module:
    model, mesh = network(), init_device_mesh("cpu", (len(SHARES),))
    for stage in model.stages:
        for one in stage.blocks:
            if any(True for _ in one.parameters()):
                fully_shard(one, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(SHARES))
    own = images().split(SHARES)[rank].clone()
    found = {
        "sync": step(nn.SyncBatchNorm.convert_sync_batchnorm(block()), own),
        "ddp": gradients(DistributedDataParallel(network()), rank),
        "fsdp": gradients(sharded(), rank),
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
