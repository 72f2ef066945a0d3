"""A live network on the kernels: few launches, and the parameters of the moment."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import io
import pickle
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from effformer.kernels import launch
from live_networks import SHAPE, Narrow, check, eager, launches_of, planned
from machine import DEVICE, ON_GPU, SLACK
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from effformer import EfficientFormer, create_model
from effformer.model import live
from effformer.testing import randomise

pytestmark = pytest.mark.usefixtures("kernel_device")


@pytest.fixture
def network(narrow: Narrow) -> EfficientFormer:
    return narrow(dtype=torch.float32, backend="triton", device=DEVICE)


# --- launches ---------------------------------------------------------------------------------------------------------


# Of a forward at 224x224: in float32, in float16.
LAUNCHES = {
    ("efficientformer_l1", 1): (51, 44),
    ("efficientformer_l1", 256): (52, 40),
    ("efficientformer_l3", 1): (98, 80),
    ("efficientformer_l3", 256): (99, 91),
    ("efficientformer_l7", 1): (146, 122),
    ("efficientformer_l7", 256): (147, 135),
}


@pytest.mark.parametrize(("name", "batch"), LAUNCHES)
def test_launches_of_a_forward(name: str, batch: int) -> None:
    network = create_model(name, backend="triton").eval()
    for dtype, expected in zip((torch.float32, torch.float16), LAUNCHES[name, batch], strict=True):
        network.to(dtype)
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.empty(batch, 3, 224, 224, dtype=dtype).to(memory_format=layout)
            for _ in range(2):  # the first one plans
                launches, operations = launches_of(partial(network, x))
            assert operations == []
            assert len(launches) == expected or ON_GPU  # where other tiles may have been tuned
            assert sum(one.kernel.__name__ == "fold_kernel" for one in launches) == 6


def test_launches_of_timms_network(timm: Any) -> None:
    """Beside which ours are counted."""
    network = timm.create_model("efficientformer_l1").eval()
    x = torch.zeros(1, 3, 224, 224, device="cpu")
    network.cpu()(x)  # expands the bias
    _, operations = launches_of(partial(network, x))
    assert len(operations) == 189


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
    """The same address and other strides: a square matrix transposed."""
    if tensor.ndim in (2, 4) and tensor.shape[0] == tensor.shape[1]:
        tensor.data = tensor.data.transpose(0, 1)


def space_out(tensor: Tensor) -> None:
    """Vectors with gaps between their elements."""
    if tensor.ndim == 1:
        tensor.data = torch.stack([tensor.data + 0.25, tensor.data], 1)[:, 0]


on_cpu = pytest.mark.skipif(ON_GPU, reason="writes from the CPU")


@pytest.mark.parametrize(
    "change",
    [
        shift,
        replace_data,
        restride_data,
        space_out,
        pytest.param(shift_in_numpy, marks=on_cpu),
        pytest.param(poke, marks=on_cpu),
    ],
)
def test_each_forward_reads_the_parameters_of_then(narrow: Narrow, change: Callable[[Tensor], None]) -> None:
    network = narrow(dtype=torch.float32, backend="triton", device=DEVICE, mlp_ratio=1)  # with square matrices
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


def test_a_network_is_freed_at_once(narrow: Narrow) -> None:
    """Not by the garbage collector, which PyTorch does not wait for before it lacks memory."""
    network = narrow(dtype=torch.float32, backend="triton", device=DEVICE)
    check(network, torch.randn(SHAPE))
    gone = [weakref.ref(part) for part in (network, network.stem, network.stages[2], network.head)]
    gc.collect()
    gc.disable()
    try:
        del network
        assert [one() for one in gone] == [None] * 4
    finally:
        gc.enable()


def test_states_that_never_stay_are_not_planned(network: EfficientFormer) -> None:
    x = torch.randn(SHAPE)
    for _ in range(6):
        replace_data(network.stem.conv1.weight)
        check(network, x)
    assert planned(network)[0] is False
    check(network, x)
    check(network, x)
    assert planned(network)[0] is True


def test_users_attributes_of_the_network_do_not_matter(network: EfficientFormer) -> None:
    x = torch.randn(SHAPE)
    for number in range(7):
        network.calls = number
        network.mean = np.full(3, number)
        network.stem.mean = np.full(3, number)
        check(network, x)
    assert planned(network)[-1]


def test_swapped_names_count(network: EfficientFormer) -> None:
    """The same addresses in the same order, under other names."""
    x, norm = torch.randn(SHAPE), network.stem.norm1
    check(network, x)
    weight, bias = norm.weight, norm.bias
    del norm.weight, norm.bias
    norm.bias, norm.weight = weight, bias
    check(network, x)


def test_plans_are_few(network: EfficientFormer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_MOST_PLANS", 3)
    for batch in (1, 2, 3, 4, 1):
        with torch.no_grad(), launch.recorded(run=False):
            network(torch.randn(batch, *SHAPE[1:]))
    state = live._states[network.stem]
    assert [form[0][0] for form in state.plans] == [3, 4, 1]


def test_threads(network: EfficientFormer, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU they plan at once, and launch nothing: the interpreter is for one thread."""
    images = [torch.randn(1, 3, 32, 32 * width) for width in (1, 2)]
    expected = [eager(network, x) for x in images]

    with torch.no_grad(), launch.recorded(run=False):
        network(torch.randn(1, 3, 32, 96))
    made: list[object] = []
    new_plan = live._new_plan

    def counted(part: Any, *arguments: Any) -> Any:
        made.append(part)
        time.sleep(0.01)  # for the other threads to come
        return new_plan(part, *arguments)

    monkeypatch.setattr(live, "_new_plan", counted)

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
    assert {len(live._states[part].plans) for part in (network.stem, network)} == {3}
    assert len(made) == 2 * 6
