"""One of two processes whose BatchNorms share their statistics; `test_train_mode.py` starts them.

    python sync_worker.py RANK FOLDER

FOLDER/RANK.pt gets the result of a block on this process's images, the gradients of their loss, and buffers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

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


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(SHARES))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(block())
    own = images().split(SHARES)[rank].clone()
    torch.save(step(model, own), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
