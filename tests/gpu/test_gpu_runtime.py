"""Launches in CUDA graphs, on streams and devices, with reused memory, under autocast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_cases import MODELS, WORKS, network
from machine import DEVICE, REHEARSED, check, id_of, measured, same

from effformer import ops, set_backend
from effformer.testing import accuracy, draw_map, meta4d_case

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernel_device")]
# The first, most often fused, and the last, widest, work of each operation.
CHOSEN = sorted(
    {chosen for works in (WORKS, WORKS[::-1]) for chosen in {w.operation: w for w in works}.values()}, key=str
)
SIDES = (64, 96) if REHEARSED else (224, 224)


# --- CUDA graphs ----------------------------------------------------------------------------------------------------------


def captured(call: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of `call` and its result, which each replay writes again. Kernels are loaded before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def disturb() -> None:
    """Memory that a graph should have kept, but did not, is overwritten."""
    torch.full((2**28,), float("nan"))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=id_of)
@pytest.mark.parametrize("work", CHOSEN, ids=str)
def test_graph_of_an_operation(work: object, dtype: torch.dtype) -> None:
    case = work.case(4, dtype)  # type: ignore[attr-defined]
    x = case.arguments[0]
    graph, out = captured(lambda: case.run("triton"))
    for _ in range(3):
        x.normal_()
        disturb()
        graph.replay()
        same(out, case.run("triton"))
    check(case)


@pytest.mark.cuda
@torch.no_grad()
def test_graph_of_sums_in_any_order() -> None:
    """Programs add to memory that each replay must find at zero."""
    case = meta4d_case(draw_map((1, 448, 7, 7), torch.bfloat16), 1792)
    x = case.arguments[0]

    def call() -> torch.Tensor:
        return ops.meta4d(*case.arguments, **case.options, deterministic=False, backend="triton")

    graph, out = captured(call)
    for _ in range(3):
        x.normal_()
        disturb()
        graph.replay()
        assert accuracy(out, case.exact(), case.run("eager")).passes()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=id_of)
@torch.no_grad()
def test_graph_of_a_network(dtype: torch.dtype) -> None:
    """Two graphs, of two batches, replayed in turns."""
    model = network(MODELS[0], dtype, "triton").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = [draw_map((batch, 3, *SIDES), dtype) for batch in (1, 16)]
    graphs = [captured(lambda x=x: model(x)) for x in images]  # type: ignore[misc]
    for _ in range(3):
        for x, (graph, out) in zip(images, graphs, strict=True):
            x.normal_()
            disturb()
            graph.replay()
            same(out, model(x))


@pytest.mark.cuda
@torch.no_grad()
def test_a_forward_never_waits_for_the_gpu() -> None:
    model = network(MODELS[0], torch.bfloat16, "triton").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = draw_map((2, 3, *SIDES), torch.bfloat16)
    model(x)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x)
    finally:
        torch.cuda.set_sync_debug_mode(before)


# --- streams and devices ----------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("work", CHOSEN, ids=str)
def test_two_streams(work: object) -> None:
    cases = [work.case(8, torch.bfloat16) for _ in range(2)]  # type: ignore[attr-defined]
    expected = [case.run("triton") for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for stream, case, kept in zip(streams, cases, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(case.run("triton"))
    torch.cuda.synchronize()
    for kept, wanted in zip(results, expected, strict=True):
        for result in kept:
            same(result, wanted)


@pytest.mark.cuda
@pytest.mark.parametrize("work", CHOSEN, ids=str)
def test_another_device_than_the_current_one(work: object) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    assert torch.cuda.current_device() == 0
    with torch.device("cuda:1"):
        case = work.case(4, torch.bfloat16)  # type: ignore[attr-defined]
    check(case)
    assert case.run("triton").device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0


# --- memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@torch.no_grad()
def test_memory_stays_level() -> None:
    model = network(MODELS[0], torch.bfloat16, "triton").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = draw_map((16, 3, *SIDES), torch.bfloat16)
    levels, peaks = [], []
    for _ in range(53):
        torch.cuda.reset_peak_memory_stats()
        model(x)
        torch.cuda.synchronize()
        levels.append(torch.cuda.memory_allocated())
        peaks.append(torch.cuda.max_memory_allocated())
    assert len(set(levels[3:])) == 1, levels
    assert len(set(peaks[3:])) == 1, peaks


# --- autocast -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16] if REHEARSED else [torch.float16, torch.bfloat16], ids=id_of)
@torch.no_grad()
def test_autocast(dtype: torch.dtype) -> None:
    """Of a float32 network: the logits, beside those of eager PyTorch under autocast."""
    model = network(MODELS[0], torch.float32, "triton").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = draw_map((2, 3, *SIDES), torch.float32)
    results = {}
    for backend in ("triton", "eager"):
        set_backend(model, backend)
        with torch.autocast(DEVICE.type, dtype):
            results[backend] = model(x)
    exact = model.double()(x.double())
    found = accuracy(results["triton"], exact, results["eager"])
    measured("network, autocast", results["triton"], found)
    assert found.passes(), found
    assert found.max_error > 1e-5, "no 16-bit products"


@pytest.mark.parametrize("dtype", [torch.float16] if REHEARSED else [torch.float16, torch.bfloat16], ids=id_of)
@pytest.mark.parametrize("work", CHOSEN, ids=str)
def test_autocast_of_an_operation(work: object, dtype: torch.dtype) -> None:
    case = work.case(2, torch.float32)  # type: ignore[attr-defined]
    with torch.autocast(DEVICE.type, dtype):
        check(case, name=f"{case.operation}, autocast")
