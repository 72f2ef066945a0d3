"""Where a live network's modules compute: hooks, replaced parts, gradients, tracers, inputs and weights that do not fit."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from effformer.kernels.tiling import choose
from live_networks import SHAPE, Narrow, check, eager, planned
from machine import DEVICE, ON_GPU, SLACK
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from effformer import EfficientFormer, freeze, set_backend
from effformer.model import live

pytestmark = pytest.mark.usefixtures("kernel_device")


@pytest.fixture
def network(narrow: Narrow) -> EfficientFormer:
    return narrow(dtype=torch.float32, backend="triton", device=DEVICE)


def test_without_triton_the_modules_compute(network: EfficientFormer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are not even imported."""
    monkeypatch.setattr(live, "why_not_triton", lambda *_, **__: "Triton is not installed")
    for name in ("effformer.kernels.launch", "effformer.kernels.conv_norm"):
        monkeypatch.setitem(sys.modules, name, None)
    with torch.no_grad():
        assert live.decide(network.stem, torch.randn(SHAPE)) == "Triton is not installed"
        assert network.stem(torch.randn(SHAPE)).shape == (2, 8, 9, 16)


# --- where the modules compute ----------------------------------------------------------------------------------------------


def test_hooks_are_called_and_their_part_composes(network: EfficientFormer) -> None:
    x = torch.randn(SHAPE)
    check(network, x)
    calls: list[object] = []
    block = network.stages[2].blocks[0].mlp.act
    handle = block.register_forward_hook(lambda *_: calls.append(block))
    set_backend(network, "auto")  # "triton" refuses to compose
    for part in (network.stem, network.stages[0], network.stages[1], network.stages[3], network):
        set_backend(part, "triton")
    set_backend(network.stages[2].blocks[0], "auto")
    check(network, x)
    assert len(calls) == 2  # one of them by the copy
    handle.remove()
    set_backend(network, "triton")
    check(network, x)
    assert len(calls) == 2


@pytest.mark.parametrize("part", ["stem.act1", "stages.1.downsample.conv", "norm", "head", "head_drop"])
def test_hooks_of_stem_downsampling_and_end(network: EfficientFormer, part: str) -> None:
    x = torch.randn(SHAPE)
    check(network, x)
    calls: list[object] = []
    network.get_submodule(part).register_forward_pre_hook(lambda *_: calls.append(part))
    with torch.no_grad():
        network(x)
    assert calls == [part]
    check(network, x)


def test_replaced_modules_and_statistics_of_the_batch(network: EfficientFormer) -> None:
    x = torch.randn(SHAPE)
    check(network, x)
    network.stem.act2 = nn.GELU()
    check(network, x)
    network.head = nn.Sequential(network.head, nn.Tanh())
    check(network, x)
    network.stages[1].downsample.norm.train()
    before = network.stages[1].downsample.norm.running_mean.clone()
    with torch.no_grad():
        network(x)
    assert not torch.equal(before, network.stages[1].downsample.norm.running_mean)


def test_changed_settings_count(network: EfficientFormer) -> None:
    x = torch.randn(SHAPE)
    check(network, x)
    network.stages[0].blocks[0].mlp.norm1.eps = 0.5
    network.norm.eps = 0.5
    network.stem.norm1.eps = 0.5
    check(network, x)
    network.stem.conv1.stride = (1, 1)
    with torch.no_grad():
        assert network.stem(x).shape[2:] == (17, 32)


def test_methods_of_a_subclass_count(network: EfficientFormer) -> None:
    class Doubled(EfficientFormer):
        def logits(self, pooled: Tensor) -> Tensor:
            return 2 * super().logits(pooled)

    x = torch.randn(SHAPE)
    with torch.no_grad():
        expected = network(x)
        network.__class__ = Doubled
        assert torch.allclose(network(x), 2 * expected, atol=2 * SLACK)
        network.forward_features = lambda x: torch.ones(1, 2, network.num_features)  # type: ignore[method-assign]
        assert torch.equal(network(x), network.forward_head(torch.ones(1, 2, network.num_features)))


def test_a_gradient_is_wanted(network: EfficientFormer) -> None:
    x = torch.randn(SHAPE)
    check(network, x)
    set_backend(network, "auto" if ON_GPU else "eager")
    network(x).sum().backward()
    assert network.stem.conv1.weight.grad.abs().sum() > 0
    network.requires_grad_(False)
    network.stem.norm1.running_mean.requires_grad_()
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'running_mean'"):
        network.stem(x)  # as PyTorch does
    network.stem.norm1.running_mean.requires_grad_(False)
    y = network(x.requires_grad_())
    assert y.requires_grad


def test_weights_that_are_no_parameters(network: EfficientFormer) -> None:
    """Plain tensors in their place, as meta-learning has them: with gradients, and with values of the moment."""
    x, stem = torch.randn(SHAPE), network.stem.requires_grad_(False)
    with torch.no_grad():
        stem(x)
    weight = stem.conv1.weight.detach().clone()
    del stem.conv1.weight
    stem.conv1.weight = weight.clone().requires_grad_()
    assert stem(x).requires_grad
    stem.conv1.weight = weight
    with torch.no_grad():
        before = network(x)
        for owner in (network.norm, network.head, network.head_dist):  # no parameter is left at the end
            for name, value in list(owner.named_parameters()):
                delattr(owner, name)
                setattr(owner, name, value.detach().clone())
        assert torch.allclose(network(x), before, rtol=0, atol=SLACK)
        before = stem(x)
        weight.data = weight.data * 2
        assert not torch.equal(stem(x), before)


def test_transformations_see_modules(network: EfficientFormer) -> None:
    """Of a module that is planned otherwise."""
    stem, x = network.stem, torch.randn(SHAPE)
    with torch.no_grad():
        expected = stem(x)
        assert planned(network)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            traced, whole = torch.jit.trace(stem, x), torch.jit.trace(network, x)
        assert torch.allclose(traced(x[:1]), expected[:1], atol=SLACK)
        assert torch.allclose(whole(x[:1]), network(x[:1]), atol=SLACK)
        for early in (False, True):
            graph = make_fx(stem, pre_dispatch=early)(x)
            assert any("conv" in str(node.target) for node in graph.graph.nodes)
        each = torch.func.vmap(lambda one: stem(one[None])[0])(x)
        assert torch.allclose(each, expected, atol=SLACK)
        _, tangent = torch.func.jvp(stem, (x,), (torch.ones_like(x),))
        assert tangent.abs().sum() > 0
        doubled = {name: 2 * value for name, value in stem.state_dict().items() if value.is_floating_point()}
        other = torch.func.functional_call(stem, doubled, (x,))
        assert not torch.allclose(other, expected, atol=SLACK)
        assert torch.equal(stem(x), expected)
        symbolic = torch.fx.symbolic_trace(stem)
        assert torch.allclose(symbolic(x), expected, atol=SLACK)


def test_parts_refuse_inputs_as_their_modules_do(network: EfficientFormer) -> None:
    with torch.no_grad():
        network(torch.randn(SHAPE))
        for part, x in (
            (network.stem, torch.randn(2, 4, 32, 32)),
            (network.stages[1], torch.randn(2, 3, 16, 16)),
            (network.stem, torch.randn(2, 3, 32, 32, dtype=torch.float64)),
        ):
            with pytest.raises(RuntimeError):
                part(x)
        assert network.stem(torch.randn(0, 3, 32, 32)).shape == (0, 8, 8, 8)


def test_weights_of_other_shapes_raise_as_modules_do(narrow: Narrow) -> None:
    def changed(change: Callable[[EfficientFormer], object]) -> EfficientFormer:
        network = narrow(dtype=torch.float32, backend="auto" if ON_GPU else "triton", device=DEVICE)
        with torch.no_grad():
            network(x)
            change(network)
        return network

    def grey(network: EfficientFormer) -> None:
        network.stem.conv1.weight = nn.Parameter(network.stem.conv1.weight.sum(1, keepdim=True))

    def other_heads(network: EfficientFormer) -> None:
        network.head, network.head_dist = nn.Linear(12, 10), nn.Linear(12, 10)

    def other_bias(network: EfficientFormer) -> None:
        network.head.bias, network.head_dist.bias = (nn.Parameter(torch.zeros(5)) for _ in range(2))

    def other_table(network: EfficientFormer) -> None:
        network.stages[3].blocks[2].token_mixer.attention_biases = nn.Parameter(torch.randn(2, 81))

    def other_norm(network: EfficientFormer) -> None:
        network.stages[1].downsample.norm.weight = nn.Parameter(torch.ones(5))

    x = torch.randn(SHAPE)
    for change in (grey, other_heads, other_bias, other_table, other_norm):
        network = changed(change)
        with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
            network(x)


def test_plans_of_autocast_are_its_own(narrow: Narrow) -> None:
    """A map in autocast's dtype has the same form outside; there it does not fit the parameters."""
    maps = torch.randn(2, 8, 9, 16).half()
    for first in (False, True):
        stage = narrow(dtype=torch.float32, backend="auto" if ON_GPU else "triton", device=DEVICE).stages[1]
        for automatic in (first, not first, first):
            with torch.no_grad(), torch.autocast(DEVICE.type, torch.float16, enabled=automatic):
                decision = live.decide(stage, maps)
                if automatic:
                    assert isinstance(decision, live.Decision)
                    assert stage(maps).dtype == torch.float16
                else:
                    assert decision == "its input and its parameters differ in dtype"


def test_classes_of_modules_and_tables_of_tiles_count(network: EfficientFormer) -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = torch.randn(SHAPE)
    with torch.no_grad():
        before = network.stem(x)
        whole = choose.shipped_table()
        with choose.using(choose.Table(whole.entries)):
            network.stem(x)
        assert len(live._states[network.stem].plans) == 2
        network.stem.conv2.__class__ = Doubled
        assert not torch.allclose(network.stem(x), before, atol=SLACK)
        network.stem.conv2.__class__ = nn.Conv2d
        network.stem._is_replica = True
        assert live.decide(network.stem, x) == "it is a replica of DataParallel"


def test_another_device_neither_runs_nor_spoils_a_plan(network: EfficientFormer) -> None:
    x, fresh = torch.randn(SHAPE), copy.deepcopy(network)
    check(network, x)
    for one in (network, fresh):
        with torch.no_grad(), pytest.raises(RuntimeError):
            one.stem(x.to("meta"))
        with torch.no_grad():
            known = one is network  # and it has plans for this form
            reason = "its input and its parameters are on different devices" if known else "'meta' is not an NVIDIA GPU"
            assert live.decide(one.stem, x.to("meta")) == reason
        check(one, x)
        assert planned(one) == [True] * 6


def test_views_whose_sign_is_pending(network: EfficientFormer) -> None:
    real = torch.randn(SHAPE)
    x = torch.complex(real, real).conj().imag
    assert x.is_neg()
    check(network, x)
    frozen = freeze(network, torch.float32, backend="triton", cuda_graphs=False)
    assert torch.allclose(frozen(x), eager(network, -real), rtol=0, atol=SLACK)


def test_other_layouts_of_images_and_maps(network: EfficientFormer) -> None:
    images = torch.randn(2, 3, 40, 80)
    for x in (
        images[:, :, 3:36, 5:69],
        images[..., ::2],
        images.flip(0).mT,
        images.to(memory_format=torch.channels_last),
    ):
        check(network, x)
    flat = torch.randn(2 * 3 * 32 * 32 + 1)[1:].view(2, 3, 32, 32)  # an address that is no multiple of 16
    check(network, flat)
    maps = torch.randn(2, 8, 9, 7)
    with torch.no_grad():
        assert torch.allclose(network.stages[1](maps), network.stages[1](maps.to(memory_format=torch.channels_last)))
    assert planned(network) == [True] * 6


@pytest.mark.parametrize("resize", ["table", "matrix-bilinear"])
def test_every_way_to_resize_the_bias(narrow: Narrow, resize: str) -> None:
    network = narrow(dtype=torch.float32, backend="triton", device=DEVICE, table_resolution=2, bias_resize=resize)
    for size in ((64, 64), (96, 128), (32, 160)):
        check(network, torch.randn(1, 3, *size))
    assert planned(network)[4]
