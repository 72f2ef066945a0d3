"""A live network on the kernels: few launches, the parameters of the moment, and modules where they are asked for."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from effformer.kernels import launch
from machine import DEVICE, ON_GPU, SLACK
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from effformer import EfficientFormer, create_model, set_backend
from effformer.model import live
from effformer.testing import randomise

pytestmark = pytest.mark.usefixtures("kernel_device")

Narrow = Callable[..., EfficientFormer]
SHAPE = (2, 3, 33, 64)


class Operations(TorchDispatchMode):
    """Names of the operators below the dispatcher, without views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("empty", "empty_strided", "detach"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def launches_of(call: Callable[[], object]) -> tuple[list[launch.Launch], list[str]]:
    """Triton's launches, which are not carried out, and PyTorch's own operators."""
    with torch.no_grad(), launch.recorded(run=False) as launches, Operations() as operations:
        call()
    return launches, operations.names


def planned(network: EfficientFormer) -> list[bool]:
    """Whether the last forward of the stem, of each stage and of the end was by a plan."""
    memories = [vars(part).get("_memory") for part in (network.stem, *network.stages, network)]
    return [memory is not None and bool(memory.state and any(memory.state.plans.values())) for memory in memories]


@pytest.fixture
def network(narrow: Narrow) -> EfficientFormer:
    return narrow(dtype=torch.float32, backend="triton", device=DEVICE)


def eager(network: EfficientFormer, x: Tensor) -> Tensor:
    """The result of a copy whose modules compute it."""
    other = copy.deepcopy(network)
    set_backend(other, "eager")
    with torch.no_grad():
        return other(x)


def check(network: EfficientFormer, x: Tensor, **tolerance: float) -> None:
    with torch.no_grad():
        assert torch.allclose(network(x), eager(network, x), rtol=0, atol=SLACK)


# --- launches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "most"), [("efficientformer_l1", 64), ("efficientformer_l7", 170)])
@pytest.mark.parametrize("batch", [1, 256])
def test_launches_of_a_forward(name: str, most: int, batch: int) -> None:
    network = create_model(name, backend="triton").eval()
    counts = set()
    for dtype in (torch.float32, torch.float16):
        network.to(dtype)
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.empty(batch, 3, 224, 224, dtype=dtype).to(memory_format=layout)
            for _ in range(2):  # the first one plans
                launches, operations = launches_of(partial(network, x))
            assert operations == []
            counts.add(len(launches))
            assert len(launches) <= most
            assert sum(one.kernel.__name__ == "fold_kernel" for one in launches) == 6
    assert min(counts) > most // 2


def test_launches_under_autocast(network: EfficientFormer) -> None:
    x = torch.randn(SHAPE)
    with torch.autocast(DEVICE.type, torch.float16):
        for _ in range(2):
            launches, operations = launches_of(lambda: network(x))
    assert operations == []
    assert all(one.constants.get("PRECISION", "ieee") == "ieee" for one in launches)  # of 16-bit products
    assert planned(network) == [True] * 6


def test_dense_maps_from_the_stem_on(network: EfficientFormer) -> None:
    with torch.no_grad():
        maps = network.forward_intermediates(torch.randn(SHAPE), intermediates_only=True)
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in maps[:3])


# --- the parameters of the moment ----------------------------------------------------------------------------------------


def poke(tensor: Tensor) -> None:
    """Write through the address, which PyTorch cannot see."""
    values = tensor.detach().cpu().flatten() + 0.25
    ctypes.memmove(tensor.data_ptr(), values.data_ptr(), 4 * values.numel())


def shift(tensor: Tensor) -> None:
    tensor.data.add_(0.25)


def shift_in_numpy(tensor: Tensor) -> None:
    tensor.detach().numpy()[...] += 0.25


def replace_data(tensor: Tensor) -> None:
    tensor.data = tensor.data + 0.25


def restride_data(tensor: Tensor) -> None:
    """The same address and other strides: a square matrix transposed, a vector with gaps."""
    if tensor.ndim == 1:
        tensor.data = torch.stack([tensor.data + 0.25, tensor.data], 1)[:, 0]
    elif tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]:
        tensor.data = tensor.data.t()


on_cpu = pytest.mark.skipif(ON_GPU, reason="writes from the CPU")


@pytest.mark.parametrize(
    "change",
    [shift, replace_data, restride_data, pytest.param(shift_in_numpy, marks=on_cpu), pytest.param(poke, marks=on_cpu)],
)
def test_each_forward_reads_the_parameters_of_then(network: EfficientFormer, change: Callable[[Tensor], None]) -> None:
    x = torch.randn(SHAPE)
    with torch.no_grad():
        before = network(x)
        for tensor in network.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                change(tensor)
        check(network, x)
        assert not torch.allclose(network(x), before, atol=SLACK)


def test_loaded_and_moved_parameters(network: EfficientFormer, narrow: Narrow) -> None:
    x, other = torch.randn(SHAPE), narrow(seed=7, dtype=torch.float32)
    check(network, x)
    network.load_state_dict(other.state_dict())
    check(network, x)
    network.load_state_dict(narrow(seed=8, dtype=torch.float32, device=DEVICE).state_dict(), assign=True)
    check(network, x)
    network.stages[0].blocks[0].mlp.fc1.bias = None
    check(network, x)
    randomise(network.to(memory_format=torch.channels_last), seed=9)
    check(network, x)
    network.double().float()
    check(network, x)
    assert planned(network) == [True] * 6


def test_an_average_of_weights(network: EfficientFormer, narrow: Narrow) -> None:
    x = torch.randn(SHAPE)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    average.eval()
    for seed in (3, 4):
        randomise(network, seed)
        average.update_parameters(network)
        check(average.module, x)
        check(network, x)
    assert planned(average.module) == planned(network) == [True] * 6


def test_copies_know_no_addresses(network: EfficientFormer) -> None:
    x = torch.randn(SHAPE)
    with torch.no_grad():
        expected = network(x)
        for again in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), copy.copy(network)):
            assert torch.equal(again(x), expected)
            if again.stem is not network.stem:
                randomise(again, seed=5)
                check(again, x)
        file = io.BytesIO()
        torch.save(network, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), expected)
        assert torch.equal(network(x), expected)


def test_a_network_is_forgotten(narrow: Narrow) -> None:
    network = narrow(dtype=torch.float32, backend="triton", device=DEVICE)
    check(network, torch.randn(SHAPE))
    gone = weakref.ref(network.stem)
    del network
    gc.collect()
    assert gone() is None


def test_states_that_never_stay_are_not_planned(network: EfficientFormer) -> None:
    x = torch.randn(SHAPE)
    for _ in range(6):
        replace_data(network.stem.conv1.weight)
        check(network, x)
    assert planned(network)[0] is False
    check(network, x)
    check(network, x)
    assert planned(network)[0] is True


def test_plans_are_few(network: EfficientFormer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_MOST_PLANS", 3)
    for batch in (1, 2, 3, 4, 1):
        with torch.no_grad(), launch.recorded(run=False):
            network(torch.randn(batch, *SHAPE[1:]))
    state = vars(network.stem)["_memory"].state
    assert [form[0][0] for form in state.plans] == [3, 4, 1]


def test_threads(network: EfficientFormer) -> None:
    """On a CPU they plan at once, and launch nothing: the interpreter is for one thread."""
    images = [torch.randn(1, 3, 32, 32 * width) for width in (1, 2)]
    expected = [eager(network, x) for x in images]

    def work(number: int) -> None:
        torch.set_default_device(DEVICE)
        for _ in range(5):
            with torch.no_grad(), contextlib.nullcontext() if ON_GPU else launch.recorded(run=False):
                found = network(images[number % 2])
            assert found.shape == (1, 10)
            assert not ON_GPU or torch.allclose(found, expected[number % 2], rtol=0, atol=SLACK)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))
    assert planned(network) == [True] * 6
    assert {len(vars(part)["_memory"].state.plans) for part in (network.stem, network)} == {2}


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
    y = network(x.requires_grad_())
    assert y.requires_grad


def test_transformations_see_modules(network: EfficientFormer) -> None:
    """Of a module that is planned otherwise."""
    stem, x = network.stem, torch.randn(SHAPE)
    with torch.no_grad():
        expected = stem(x)
        assert planned(network)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            traced = torch.jit.trace(stem, x)
        assert torch.allclose(traced(x[:1]), expected[:1], atol=SLACK)
        graph = make_fx(stem)(x)
        assert any("convolution" in str(node.target) for node in graph.graph.nodes)
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
