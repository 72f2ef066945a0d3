"""Networks that train on the kernels: modules, statistics, compilers, wrappers, several processes."""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sync_worker
import torch
from compiling import TESTS
from effformer.kernels.launch import recorded
from machine import DEVICE
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from train_cases import draw

import effformer
from effformer import EfficientFormer, ops
from effformer.model.meta4d import Meta4D
from effformer.testing import float32_as_such, randomise

pytestmark = pytest.mark.usefixtures("kernel_device")


def _step(network: nn.Module, x: Tensor, backend: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients and buffers after one step on a copy, with the same random numbers each time."""
    network = copy.deepcopy(network)
    effformer.set_backend(network, backend)
    torch.manual_seed(5)
    with float32_as_such():
        result = network(x)
        (result[0] if isinstance(result, tuple) else result).square().mean().backward()
    return {name: one.grad for name, one in network.named_parameters()}, dict(network.named_buffers())


def _same(network: nn.Module, x: Tensor) -> set[str]:
    """Compare a step by kernels with one by modules; the names of the kernels."""
    wanted, moved = _step(network, x, "eager")
    with recorded() as launches:
        found, buffers = _step(network, x, "triton")
    for name, one in wanted.items():
        if one is not None:
            bound = 3e-4 * one.abs().max().item() + 1e-6  # eager's noise where a bias has no gradient
            assert torch.allclose(found[name], one, rtol=0, atol=bound), name
    for name, one in moved.items():
        assert torch.allclose(buffers[name].double(), one.double(), rtol=1e-5, atol=1e-5), name
    return {one.kernel.__name__ for one in launches}


def test_a_network_in_training(narrow: Callable[..., EfficientFormer]) -> None:
    """Batch statistics, stochastic depth with the modules' random numbers, 3D blocks, running statistics."""
    network = narrow(dtype=torch.float32, drop_path_rate=0.4).train()
    names = _same(network, torch.randn(3, 3, 64, 64))
    assert {"gram_kernel", "combine_kernel", "pool_keep_kernel", "attention_backward_kernel"} <= names


@pytest.mark.parametrize(
    "kind", ["momentum", "average", "untracked", "frozen with stochastic depth", "eval, untracked"]
)
def test_kinds_of_statistics(narrow: Callable[..., EfficientFormer], kind: str) -> None:
    network = narrow(dtype=torch.float32, drop_path_rate=0.4).train()
    for norm in (one for one in network.modules() if isinstance(one, nn.BatchNorm2d)):
        if kind == "average":
            norm.momentum = None
        elif "untracked" in kind:
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        elif kind == "momentum":
            norm.momentum = 0.3
        if kind.startswith(("frozen", "eval")):
            norm.eval()
    assert "combine_kernel" in _same(network, torch.randn(3, 3, 64, 64))


def test_checkpointing_moves_the_statistics_once(narrow: Callable[..., EfficientFormer]) -> None:
    network = narrow(dtype=torch.float32, drop_path_rate=0.4).train()
    x = torch.randn(3, 3, 64, 64)
    plain = _step(network, x, "triton")
    network.set_grad_checkpointing(True)
    again = _step(network, x, "triton")
    for one, other in zip(plain, again, strict=True):
        for name, value in one.items():
            if value is not None:
                scale = value.double().abs().max().item()
                assert torch.allclose(other[name].double(), value.double(), rtol=0, atol=1e-6 * scale), name


def test_a_compiled_step_without_breaks(narrow: Callable[..., EfficientFormer]) -> None:
    network = narrow(dtype=torch.float32, backend="triton", depths=(1, 1, 1, 1), num_vit=0).train()
    block = network.stages[0].blocks[0]
    x = torch.randn(2, network.config.widths[0], 5, 6)
    found = []
    for how in (lambda one: one, lambda one: torch.compile(one, backend="aot_eager", fullgraph=True)):
        own = copy.deepcopy(block)
        with float32_as_such():
            how(own)(x).square().sum().backward()
        found.append([*(one.grad for one in own.parameters()), *own.buffers()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_network_step_by_inductor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A training step of 4D and 3D blocks without graph breaks: gradients and running statistics as without it."""
    # A run that was cut off leaves half a file in the usual folder.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plain = sync_worker.network().to(DEVICE)
    compiled = copy.deepcopy(plain)
    x = torch.randn(2, 3, 64, 64)
    for model, call in ((plain, plain), (compiled, torch.compile(compiled, fullgraph=True))):
        model.zero_grad()
        with float32_as_such():
            result = call(x)
            (result[0] if isinstance(result, tuple) else result).square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        if one.grad is not None:
            bound = 3e-4 * one.grad.abs().max().item() + 5e-6  # noise where a bias has no gradient
            assert torch.allclose(one.grad, other.grad, rtol=0, atol=bound), name
    for (name, one), other in zip(plain.named_buffers(), compiled.buffers(), strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-5), name


def test_an_average_of_the_weights(narrow: Callable[..., EfficientFormer]) -> None:
    """torch's `AveragedModel` follows steps on the kernels, buffers included."""
    network = narrow(dtype=torch.float32, backend="triton").train()
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True)
    average.update_parameters(network)  # the first time as they are
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(torch.randn(3, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    average.update_parameters(network)
    moved = 0
    for name, one in network.state_dict().items():
        if one.is_floating_point():
            wanted = 0.75 * before[name] + 0.25 * one
            assert torch.allclose(average.module.state_dict()[name], wanted, rtol=1e-5, atol=1e-6), name
            moved += not torch.equal(one, before[name])
    assert moved > 20


def test_autocast_and_functional_gradients(narrow: Callable[..., EfficientFormer]) -> None:
    """Parameters stay float32, statistics move; `torch.func.grad` goes without tracked statistics, as PyTorch's does."""
    network = narrow(dtype=torch.float32, backend="triton").train()
    block = network.stages[0].blocks[0]
    x = torch.randn(2, network.config.widths[0], 5, 6)
    before = block.mlp.norm1.running_mean.clone()
    with torch.autocast(DEVICE.type, torch.float16):
        result = block(x)
    result.float().square().sum().backward()
    assert result.dtype == torch.float32
    assert block.mlp.fc1.weight.grad.dtype == torch.float32
    assert not torch.equal(block.mlp.norm1.running_mean, before)

    case = draw((2, 8, 3, 5), torch.float32)
    _, weight, *others = case.tensors[1:]
    scale = case.tensors[1]

    def loss(x: Tensor, backend: str) -> Tensor:
        return ops.meta4d_train(x, scale, weight, *others, backend=backend).result.square().sum()

    with float32_as_such():
        one, other = (torch.func.grad(loss)(case.tensors[0], backend) for backend in ("triton", "eager"))
    assert torch.allclose(one, other, rtol=0, atol=2e-4 * other.abs().max().item())


def test_modes_that_no_kernel_computes(narrow: Callable[..., EfficientFormer]) -> None:
    network = narrow(dtype=torch.float32, backend="triton").train()
    block = network.stages[0].blocks[0]
    assert isinstance(block, Meta4D)
    x = torch.randn(2, network.config.widths[0], 5, 6)
    block.mlp.norm2.eval()
    with pytest.raises(ops.UnsupportedError, match="one BatchNorm uses batch statistics, the other one does not"):
        block(x)
    block.mlp.norm2.train()
    block.mlp.drop.p = 0.5
    with pytest.raises(ops.UnsupportedError, match="dropout is active here"):
        block(x)
    block.mlp.drop.p = 0.0
    block.backend = "auto"
    assert block(x).shape == x.shape  # on a CPU by its modules


def test_two_processes(tmp_path: Path) -> None:
    """SyncBatchNorm equals the whole batch, whose images are shared out unevenly; wrappers average the gradients."""
    if DEVICE.type == "cuda":
        pytest.skip("the processes are on the CPU")
    command = [sys.executable, str(TESTS / "sync_worker.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in (0, 1)]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    processes = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]

    whole = sync_worker.step(sync_worker.block(), sync_worker.images())
    for name, wanted in whole.items():
        one, other = (part["sync"][name] for part in processes)
        if name in ("result", "x"):
            found = torch.cat([one, other])
        elif name.startswith("gradient"):
            found = one + other
        else:
            assert torch.equal(one, other), name
            found = one
        bound = 2e-6 * wanted.double().abs().max().item() + 1e-6
        assert torch.allclose(found.double(), wanted.double(), rtol=0, atol=bound), name

    first, second = (sync_worker.gradients(sync_worker.network(), rank) for rank in (0, 1))
    for part, wrapper in itertools.product(processes, ("ddp", "fsdp")):
        assert part[wrapper].keys() == first.keys()
        for name, grad in part[wrapper].items():
            wanted = (first[name] + second[name]) / 2
            bound = 1e-6 * wanted.abs().max().item() + 1e-6  # noise where a bias has no gradient
            assert torch.allclose(grad, wanted, rtol=0, atol=bound), (wrapper, name)


def test_explain_asks_no_other_process(narrow: Callable[..., EfficientFormer], monkeypatch: pytest.MonkeyPatch) -> None:
    """With shared statistics it may be called in one process alone: a collective would wait for the others."""
    network = narrow(dtype=torch.float32, backend="triton", device=DEVICE).train()
    monkeypatch.setattr("effformer.model.meta4d.group_of", lambda norm: "not a group")
    found = {one.part: one for one in effformer.explain(network, torch.randn(2, 3, 64, 64)).parts}
    assert found["stages.0.blocks.0"].path == "kernels"
    with pytest.raises(AttributeError, match="group_name"):
        network.stages[0].blocks[0](torch.randn(2, network.config.widths[0], 5, 6))


def test_steps_stay_near_float64() -> None:
    """Fifty steps of SGD with momentum and stochastic depth: as far from float64 as eager's, or 1.5 times as far."""
    network = randomise(
        effformer.create_model(
            "efficientformer_l1",
            depths=(1, 1, 1, 1),
            num_vit=0,
            num_classes=0,
            drop_path_rate=0.0,
            widths=(16, 32, 48, 64),
        )
    )
    block = network.stages[0].blocks[0].train()
    x, target = (torch.randn(4, 16, 4, 5) for _ in range(2))
    ends = {}
    for how, dtype in (("exact", torch.float64), ("eager", torch.float32), ("triton", torch.float32)):
        own = copy.deepcopy(block).to(DEVICE, dtype)
        own.backend = "eager" if how == "exact" else how
        optimizer = torch.optim.SGD(own.parameters(), lr=0.02, momentum=0.9)
        with float32_as_such():
            for _ in range(50):
                optimizer.zero_grad()
                (own(x.to(dtype)) - target.to(dtype)).square().mean().backward()
                optimizer.step()
        tensors = itertools.chain(own.parameters(), own.buffers())
        ends[how] = torch.cat([one.detach().flatten().double() for one in tensors])
    ours, eager = ((ends[how] - ends["exact"]).norm() for how in ("triton", "eager"))
    assert eager > 0
    assert ours <= 1.5 * eager


def test_the_example_has_the_losses_of_eager(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/examples/finetune.py with AdamW and stochastic depth, on fewer blocks: three steps, to four digits."""
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(TESTS.parent / "docs" / "examples")
    finetune = importlib.import_module("finetune")
    fewer = functools.partial(effformer.create_model, depths=(1, 1, 1, 2), widths=(16, 32, 48, 64))
    monkeypatch.setattr(effformer, "create_model", fewer)
    losses = []
    for backend in ("eager", "triton"):
        with float32_as_such(), recorded() as launches:
            finetune.main(["--steps", "3", "--batch-size", "24", "--backend", backend])
        losses.append([float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()])
    assert any(one.kernel.__name__ == "attention_backward_kernel" for one in launches)
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
