"""The 4D block in training by kernels: batch statistics, stochastic depth, and the gradients of both."""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sync_worker
import torch
from compiling import TESTS, needs_compiler
from compiling import run as run_compiled
from effformer.kernels import operators
from effformer.kernels.launch import recorded
from effformer.kernels.statistics import channel_statistics, covariance
from machine import DEVICE, DTYPES
from torch import Tensor, nn
from train_cases import TENSORS, TRAINED, draw, within

import effformer
from effformer import EfficientFormer, ops
from effformer.model.meta4d import Meta4D
from effformer.testing import LAYOUTS, float32_as_such, randomise, unwritten_is_nan

pytestmark = pytest.mark.usefixtures("kernel_device")
SHAPE = (3, 24, 9, 11)  # 297 pixels: more than two tiles of rows, and a part of one


# --- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mean", [0.0, 4.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_result_statistics_and_gradients(dtype: torch.dtype, mean: float, frozen: bool) -> None:
    """With stochastic depth and without, of inputs with channels' means of 0 and 4 deviations."""
    for keep in (False, True):
        assert within(draw(SHAPE, dtype, mean=mean, keep=keep, frozen=frozen)) == []


@pytest.mark.parametrize("channels", [48, 224])
def test_widths_of_networks(channels: int) -> None:
    assert within(draw((2, channels, 7, 10), torch.float16, hidden=2 * channels, mean=1.0)) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    case = draw((3, 20, 5, 7), torch.float16, layout=layout, keep=True)
    assert within(case) == []
    assert within(case._replace(grad=case.grad.contiguous())) == []
    assert within(case._replace(grad=torch.tensor(0.5).half().expand_as(case.grad))) == []
    result, gradients = case.by("triton")
    _, eager = case.by("eager")
    assert result[0].stride() == ops.pool_mixer(case.tensors[0], case.tensors[1], backend="triton").stride()
    assert gradients[0].stride() == eager[0].stride()


@pytest.mark.parametrize("activation", ["relu", "silu", "hard_swish"])
def test_activations(activation: str) -> None:
    for dtype in DTYPES:
        assert within(draw(SHAPE, dtype, activation=activation)) == []


def test_convolutions_without_a_bias() -> None:
    for frozen in (False, True):
        assert within(draw((2, 20, 5, 9), torch.float16, bias=False, frozen=frozen)) == []


@needs_compiler
def test_bfloat16_as_compiled() -> None:
    """The compiled kernels, executed on the CPU for three GPUs: within the rule, and without a fault."""
    if DEVICE.type == "cuda":
        pytest.skip("the GPU itself computes bfloat16")
    found = json.loads(run_compiled(str(TESTS / "train_worker.py")))
    assert len(found) == 6
    for one in found:
        assert not one["wrong"], one
        assert not one["faults"], one
        assert {"gram_kernel", "combine_kernel", "gradient_sums_kernel", "mlp_backward_kernel"} <= set(one["kernels"])


# --- statistics -------------------------------------------------------------------------------------------------------


def _relative(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).abs() / exact.abs()).max().item()


@pytest.mark.parametrize(
    ("mean", "correlation", "bound"),
    [(0.0, 0.0, 1e-6), (4.0, 0.0, 1e-4), (30.0, 0.0, 1e-5), (0.0, 0.99, 2e-5), (0.0, 0.9999, 5e-3)],
)
def test_variances_from_the_covariance(mean: float, correlation: float, bound: float) -> None:
    """Of hidden units that see differences of channels, which may be almost alike, in float16."""
    rows, channels = 5000, 32
    common = torch.randn(rows, 1) * correlation**0.5
    x = (common + torch.randn(rows, channels) * (1 - correlation) ** 0.5 + mean * torch.randn(channels).sign()).half()
    weight = torch.randn(64, channels)
    weight = (weight - weight.mean(1, keepdim=True)).double()
    middle, found = covariance(x)
    exact = x.double()
    assert torch.allclose(middle, exact.mean(0), rtol=1e-6, atol=1e-6)
    variance = ((weight @ found) * weight).sum(1)
    assert _relative(variance, (exact @ weight.T).var(0, correction=0)) < bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 100, 1000])
def test_means_and_variances_of_channels(rows: int, dtype: torch.dtype) -> None:
    x = (torch.randn(rows, 40) + 30).to(dtype)
    with unwritten_is_nan():
        mean, variance = channel_statistics(x)
    assert _relative(mean, x.double().mean(0)) < 1e-6
    assert _relative(variance, x.double().var(0, correction=0)) < 1e-4


def test_statistics_of_several_parts_of_the_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 they are those of the product itself, whose parts are merged."""
    case = draw(SHAPE, torch.float32, mean=4.0)
    whole, _ = case.by("triton")
    monkeypatch.setattr("effformer.kernels.meta4d_train.MOST_HIDDEN", 100 * case.hidden)
    assert within(case) == []
    parts, _ = case.by("triton")
    for one, other in zip(whole, parts, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


# --- what is computed, kept and repeated ------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_not_needed_is_not_computed(frozen: bool) -> None:
    """Each argument alone has the gradient that it has beside all others."""
    case = draw((2, 20, 5, 9), torch.float16, keep=True, frozen=frozen)
    _, whole = case.by("triton")
    for place in range(TRAINED):
        with recorded() as launches:
            _, alone = case.by("triton", [place == other for other in range(TRAINED)])
        assert [one is not None for one in alone] == [place == other for other in range(TRAINED)]
        assert torch.equal(alone[place], whole[place]), place
        names = {one.kernel.__name__ for one in launches}
        assert ("pool_mixer_backward_kernel" in names) == (place < 2), place
        assert ("mlp_backward_kernel" in names) == (place < 7), place
        assert ("gradient_sums_kernel" in names) == (place >= 7 or not frozen), place


def test_the_same_bits_twice_from_any_memory() -> None:
    case = draw(SHAPE, torch.float16, keep=True)
    first = case.by("triton")
    with unwritten_is_nan():
        second = case.by("triton")
    for one, other in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(one, other)


def test_two_maps_are_kept_for_the_backward() -> None:
    """The input and an inner result; matrices of C x C and vectors beside them."""
    case = draw((4, 24, 16, 16), torch.float16, keep=True)
    leaves = [
        one if one is None or place >= TRAINED else one.requires_grad_() for place, one in enumerate(case.tensors)
    ]
    known = {one.untyped_storage().data_ptr() for one in leaves[1:] if one is not None}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = ops.meta4d_train(*leaves, backend="triton").result
    others = sorted(size for place, size in kept.items() if place not in known)
    assert others[-2:] == [leaves[0].nbytes] * 2
    assert sum(others[:-2]) <= 4 * (24 * 24 + 2 * 24 + 3 * 24 + 2 * case.hidden)
    result.sum().backward()


def test_nan_and_infinities_reach_the_parameters() -> None:
    case = draw((2, 20, 5, 9), torch.float16)
    for value in (float("inf"), float("nan")):
        grad = case.grad.clone()
        grad[1, 3, 2, 4] = value
        _, gradients = case._replace(grad=grad).by("triton")
        for place, one in enumerate(gradients):
            assert place in (3, 7) or not one.isfinite().all(), place  # of biases, which are 0


def test_an_empty_batch_with_given_statistics() -> None:
    case = draw((2, 20, 3, 4), torch.float16, frozen=True)
    x, *others = case.tensors
    empty = case._replace(tensors=[x[:0], *others], grad=case.grad[:0])
    result, gradients = empty.by("triton")
    assert result[0].shape == (0, 20, 3, 4)
    assert not any(one.any() for one in gradients)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_wrong_arguments() -> None:
    case = draw((2, 20, 5, 9), torch.float32, frozen=True, keep=True)
    given = dict(zip(TENSORS, case.tensors, strict=True))

    def refused(error: type[Exception], words: str, **changed: Any) -> None:
        for backend in ("eager", "triton"):
            with pytest.raises(error, match=words):
                ops.meta4d_train(**given | changed, backend=backend)

    refused(ValueError, "mean1, var1, mean2, var2: got mean1, var1, var2 alone, allowed are all or none", mean2=None)
    refused(ValueError, r"keep1: got shape \[3\], allowed is \[2\]", keep1=torch.ones(3))
    refused(ValueError, r"bias1: got shape \[20\]", bias1=torch.ones(20))
    refused(TypeError, "norm_weight2: got torch.float16", norm_weight2=given["norm_weight2"].half())
    refused(ValueError, "layer_scale2: got shape", layer_scale2=torch.ones(3))
    refused(ValueError, "var2: got a tensor that needs a gradient", var2=given["var2"].clone().requires_grad_())
    one = {"mean1": None, "var1": None, "mean2": None, "var2": None, "keep1": None, "keep2": None}
    for shape in ((1, 20, 1, 1), (0, 20, 5, 9)):
        refused(ValueError, "two values a channel or more", x=torch.ones(shape), **one)


def test_second_derivatives_and_forward_mode() -> None:
    case = draw((2, 8, 3, 5), torch.float32)
    x, *others = case.tensors
    x.requires_grad_()
    (first,) = torch.autograd.grad(
        ops.meta4d_train(x, *others, backend="triton").result.square().sum(), x, create_graph=True
    )
    with pytest.raises(ops.UnsupportedError, match="no second derivative, use backend='eager'"):
        first.sum().backward()
    x = x.detach()
    with pytest.raises(ops.UnsupportedError, match="in forward mode"):
        torch.func.jvp(lambda x: ops.meta4d_train(x, *others, backend="triton").result, (x,), (x,))


def test_operators_pass_opcheck() -> None:
    for frozen, keep in ((False, True), (True, False)):
        case = draw((2, 20, 3, 5), torch.float16, frozen=frozen, keep=keep)
        options = (1e-5, 1e-5, "gelu", "")
        torch.library.opcheck(operators.meta4d_train, (*case.tensors, *options))
        _, *saved = operators.meta4d_train(*case.tensors, *options)
        for needed in ([True] * TRAINED, [place % 2 == 0 for place in range(TRAINED)]):
            arguments = (case.grad, *case.tensors[:13], *saved, *options, needed)
            torch.library.opcheck(operators.meta4d_train_backward, arguments)


# --- networks ---------------------------------------------------------------------------------------------------------


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


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """SyncBatchNorm: other numbers of images, and the results, gradients and statistics of the whole batch."""
    if DEVICE.type == "cuda":
        pytest.skip("the processes are on the CPU")
    command = [sys.executable, str(TESTS / "sync_worker.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in (0, 1)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    whole = sync_worker.step(sync_worker.block(), sync_worker.images())
    assert parts[0].keys() == whole.keys()
    for name, wanted in whole.items():
        one, other = (part[name] for part in parts)
        if name in ("result", "x"):
            found = torch.cat([one, other])
        elif name.startswith("gradient"):
            found = one + other
        else:
            assert torch.equal(one, other), name
            found = one
        bound = 2e-6 * wanted.double().abs().max().item() + 1e-6
        assert torch.allclose(found.double(), wanted.double(), rtol=0, atol=bound), name


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


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_without_gradients(layout: str) -> None:
    """As BatchNorm's statistics are computed again: `torch.no_grad` in training mode."""
    case = draw((2, 20, 5, 9), torch.float32, layout=layout)
    with torch.no_grad(), float32_as_such():
        one, other = (ops.meta4d_train(*case.tensors, backend=backend) for backend in ("triton", "eager"))
    assert one.values == other.values == 90
    for found, wanted in zip(one[:-1], other[:-1], strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
