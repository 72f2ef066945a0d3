"""The serving form on a GPU: accuracy, graphs, streams, threads, memory."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from gpu_cases import MODELS, network, same_on_streams
from machine import DEVICE, DTYPES, REHEARSED, id_of, measured, same

from effformer import EfficientFormer, freeze
from effformer.testing import accuracy, draw_map, randomise

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernel_device")]
SIDES = (64, 96) if REHEARSED else (224, 224)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def snapshot(name: str, dtype: torch.dtype, **options: Any) -> tuple[EfficientFormer, Any]:
    """A float32 network, and it frozen."""
    model = network(name, torch.float32, "eager")
    return model, freeze(model, dtype, backend="triton", mean=MEAN, std=STD, **options)


def images(batch: int, *sides: int) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, *(sides or SIDES)), dtype=torch.uint8)


def normalised(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    return ((pixels.double() / 255 - mean) / std).to(dtype)


# --- accuracy -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize("batch", [1] if REHEARSED else [1, 8, 64])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_accuracy(name: str, batch: int, dtype: torch.dtype) -> None:
    """Logits and all four maps, of float images and of pixels; the second call replays a graph, where there is one."""
    pixels = images(batch)
    x = normalised(pixels, dtype)
    eager = network(name, torch.float32, "eager").to(dtype)
    exact = network(name, torch.float32, "eager").double()
    wrong = []
    for output in ("logits", "features"):
        _, frozen = snapshot(name, dtype, output=output)

        def live(model: EfficientFormer, x: torch.Tensor, output: str = output) -> list[torch.Tensor]:
            return [model(x)] if output == "logits" else model.forward_intermediates(x, intermediates_only=True)

        beside, true = live(eager, x), live(exact, x.double())
        for kind, given in (("float", x), ("uint8", pixels), ("NHWC", pixels.permute(0, 2, 3, 1).contiguous())):
            frozen(given)
            result = frozen(given)
            for index, found in enumerate([result] if output == "logits" else result):
                assert true[index].std() > 0.1
                judged = accuracy(found, true[index], beside[index])
                measured(f"{name} frozen", found, judged)
                if not judged.passes():
                    wrong.append(f"{kind} {output} {index}: {judged}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=id_of)
@pytest.mark.parametrize("name", MODELS)
def test_a_replay_gives_the_bits_of_a_launch(name: str, dtype: torch.dtype) -> None:
    """A hundred times, among graphs of other sizes, and with memory overwritten between them."""
    _, graphed = snapshot(name, dtype, output="features")
    _, launched = snapshot(name, dtype, output="features", cuda_graphs=False)
    given = [
        normalised(images(batch, *sides), dtype) for batch, *sides in ((1, 224, 224), (16, 224, 224), (2, 97, 161))
    ]
    expected = [launched(x) for x in given]
    for _ in range(34):
        for x, wanted in zip(given, expected, strict=True):
            found = graphed(x)
            torch.full((2**26,), float("nan"))
            for one, other in zip(found, wanted, strict=True):
                same(one, other)
    assert len(graphed.graphs) == 3
    assert launched.graphs == ()


# --- graphs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_limit_and_padding() -> None:
    _, frozen = snapshot(MODELS[0], torch.bfloat16, max_graphs=2, when_full="pad")
    _, launched = snapshot(MODELS[0], torch.bfloat16, cuda_graphs=False)
    frozen.capture((4, *SIDES), (16, *SIDES))
    for batch in (3, 4, 11, 16, 17):
        x = normalised(images(batch), torch.bfloat16)
        padded = 4 if batch <= 4 else 16 if batch <= 16 else batch
        wanted = launched(torch.cat([x, x.new_zeros(padded - batch, *x.shape[1:])]))[:batch]
        same(frozen(x), wanted)
    assert len(frozen.graphs) == 2


@pytest.mark.cuda
def test_new_weights_reach_the_graphs() -> None:
    model, frozen = snapshot(MODELS[0], torch.bfloat16)
    x = normalised(images(4), torch.bfloat16)
    first = frozen(x)
    randomise(model, seed=5)
    same(frozen(x), first)
    frozen.refresh()
    same(frozen(x), freeze(model, torch.bfloat16, backend="triton", cuda_graphs=False)(x))
    assert not torch.equal(frozen(x), first)


@pytest.mark.cuda
def test_within_the_callers_graph() -> None:
    _, frozen = snapshot(MODELS[0], torch.bfloat16)
    x = normalised(images(2), torch.bfloat16)
    frozen(x)
    for sides in ((224, 224), (96, 128)):  # the bias of the second has not been expanded before
        x = normalised(images(2, *sides), torch.bfloat16)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        if sides != (224, 224):
            freeze(network(MODELS[0], torch.float32, "eager"), torch.bfloat16, backend="triton")(x)  # loads the kernels
        with torch.cuda.graph(graph):
            out = frozen(x)
        graph.replay()
        same(out, frozen(x))


@pytest.mark.cuda
def test_the_buffer_that_a_graph_reads() -> None:
    _, frozen = snapshot(MODELS[0], torch.bfloat16)
    pixels = images(4)
    wanted = frozen(pixels)
    buffer = frozen.input_buffer(4, *SIDES, uint8=True)
    frozen(images(4))
    buffer.copy_(pixels)
    same(frozen(buffer), wanted)


# --- streams, threads, devices --------------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_streams_take_turns() -> None:
    """One graph, one buffer: a call on another stream waits for the one before."""
    _, frozen = snapshot(MODELS[0], torch.bfloat16)
    same_on_streams(frozen, [normalised(images(64), torch.bfloat16) for _ in range(3)])


@pytest.mark.cuda
def test_threads_take_turns() -> None:
    _, frozen = snapshot(MODELS[0], torch.bfloat16)
    _, launched = snapshot(MODELS[0], torch.bfloat16, cuda_graphs=False)
    given = [normalised(images(batch), torch.bfloat16) for batch in (1, 2, 8, 8)]
    wanted = [launched(x) for x in given]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[] for _ in given]

    def call(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                results[index].append(frozen(given[index]))

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for kept, expected in zip(results, wanted, strict=True):
        assert len(kept) == 20
        for found in kept:
            same(found, expected)


@pytest.mark.cuda
def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    model = network(MODELS[0], torch.float32, "eager").to("cuda:1")
    x = draw_map((2, 3, *SIDES), torch.bfloat16).to("cuda:1")
    frozen = freeze(model, torch.bfloat16, backend="triton")
    frozen(x)
    found = frozen(x)
    assert found.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    same(found, freeze(model, torch.bfloat16, backend="triton", cuda_graphs=False)(x))


# --- memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_memory_stays_level_and_is_given_back() -> None:
    _, frozen = snapshot(MODELS[0], torch.bfloat16)
    x = normalised(images(16), torch.bfloat16)
    frozen(x)
    torch.cuda.synchronize()
    frozen.clear()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    levels = set()
    for batch in (16, 1, 64, 16):
        frozen(normalised(images(batch), torch.bfloat16))
    for _ in range(50):
        frozen(x)
        levels.add(torch.cuda.memory_allocated())
    assert len(levels) == 1
    frozen.clear()
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before[0]
    assert torch.cuda.memory_reserved() <= before[1]
    del frozen
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() < before[0]
    assert DEVICE.type == "cuda"


@pytest.mark.cuda
def test_graphs_share_what_lies_between() -> None:
    """Beside the first graph, the next ones need their images and results, and no activations of their own."""
    _, frozen = snapshot(MODELS[0], torch.bfloat16, max_graphs=3)
    sizes = []
    for batch in (64, 63, 62):
        frozen.capture((batch, *SIDES))
        torch.cuda.empty_cache()
        sizes.append(torch.cuda.memory_reserved())
    own = 2 * 64 * 3 * SIDES[0] * SIDES[1]
    first = sizes[0]
    frozen.clear()
    gc.collect()
    torch.cuda.empty_cache()
    activations = first - torch.cuda.memory_reserved()
    assert activations > 2 * own, "else nothing is shown"
    assert sizes[2] - sizes[0] < 2 * own + activations // 2
