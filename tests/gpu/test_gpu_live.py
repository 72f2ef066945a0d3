"""Live networks by plans on a GPU: the compiled kernels called directly, in users' graphs, on streams and devices."""

from __future__ import annotations

import copy

import pytest
import torch
from effformer.kernels.launch import recorded
from gpu_cases import MODELS, network, same_on_streams
from machine import DTYPES, REHEARSED, id_of, same

from effformer import EfficientFormer, explain, set_backend
from effformer.testing import accuracy, draw_map, randomise

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernel_device")]
SHAPE = (2, 3, 64, 96) if REHEARSED else (4, 3, 224, 224)


def check(model: EfficientFormer, x: torch.Tensor) -> None:
    """The accuracy rule for the model as it is now."""
    eager = copy.deepcopy(model)
    set_backend(eager, "eager")
    expected = eager(x)
    found = accuracy(model(x), eager.double()(x.double()), expected)
    assert found.passes(), found


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_direct_calls_give_the_bits_of_tritons_own(name: str, dtype: torch.dtype) -> None:
    model, x = network(name, dtype, "triton"), draw_map(SHAPE, dtype)
    assert {part.path for part in explain(model, x).parts} == {"plan"}
    for _ in range(2):
        direct = model(x)
        with recorded():
            by_triton = model(x)
        same(direct, by_triton)
        x = draw_map(SHAPE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@torch.no_grad()
def test_changes_of_parameters(dtype: torch.dtype) -> None:
    model, x = network(MODELS[0], dtype, "triton"), draw_map(SHAPE, dtype)
    check(model, x)
    for parameter in model.parameters():
        parameter.data.mul_(1.05)
    check(model, x)
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.9
    check(model, x)
    randomise(model, 7)
    check(model, x)
    model.load_state_dict(randomise(copy.deepcopy(model), 8).state_dict(), assign=True)
    check(model, x)


@torch.no_grad()
def test_autocast() -> None:
    model, x = network(MODELS[0], torch.float32, "triton"), draw_map(SHAPE, torch.float32)
    set_backend(eager := copy.deepcopy(model), "eager")
    with torch.autocast(x.device.type, torch.float16):
        assert {part.path for part in explain(model, x).parts} == {"plan"}
        found = accuracy(model(x), copy.deepcopy(eager).double()(x.double()), eager(x))
    assert found.passes(), found


@pytest.mark.cuda
@torch.no_grad()
def test_a_users_graph_reads_the_parameters_of_each_replay() -> None:
    model, x = network(MODELS[0], torch.float16, "triton"), draw_map(SHAPE, torch.float16)
    model(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(x)
    for seed in (1, 2):
        randomise(model, seed)
        graph.replay()
        same(out, model(x))
    expected, kept = model(x), list(model.state_dict(keep_vars=True).values())
    del model  # with its plans, but the graph still reads their tables of addresses
    filled = [torch.zeros(1 << 20, dtype=torch.int64, device="cuda") for _ in range(8)]  # over what was freed
    graph.replay()
    same(out, expected)
    del filled, kept


@pytest.mark.cuda
@torch.no_grad()
def test_a_capture_before_any_forward_composes() -> None:
    model, x = network(MODELS[0], torch.float16, "auto"), draw_map(SHAPE, torch.float16)
    warm = copy.deepcopy(model)
    warm(x)  # compiles
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
        out = model(x)
    graph.replay()
    found = accuracy(out, copy.deepcopy(model).double()(x.double()), warm(x))
    assert found.max_error <= 4 * found.eager_max_error + 4 * found.ulp, found


@pytest.mark.cuda
@torch.no_grad()
def test_streams() -> None:
    model = network(MODELS[0], torch.float16, "triton")
    same_on_streams(model, [draw_map(SHAPE, torch.float16) for _ in range(2)])


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@torch.no_grad()
def test_two_devices_at_once() -> None:
    model, x = network(MODELS[0], torch.float16, "triton"), draw_map(SHAPE, torch.float16)
    other = copy.deepcopy(model).to("cuda:1")
    for _ in range(3):
        same(model(x).cpu(), other(x.to("cuda:1")).cpu())
    with pytest.raises(RuntimeError):
        model(x.to("cuda:1"))
    moved = model.to("cuda:1")
    same(moved(x.to("cuda:1")), other(x.to("cuda:1")))


@pytest.mark.cuda
@torch.no_grad()
def test_memory_is_freed_with_the_network() -> None:
    x = draw_map(SHAPE, torch.float16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model = network(MODELS[0], torch.float16, "triton")
    model(x)
    model(x)
    del model
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
