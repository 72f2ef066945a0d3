"""CUDA graphs of the serving form, by a stand-in that records what a graph would. See gpu/test_gpu_frozen.py."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from effformer.kernels.launch import recorded
from frozen_results import MEAN, STD, close, listed, live, normalised
from torch import Tensor

import effformer
from effformer import EfficientFormer, EfficientFormerConfig, freeze
from effformer.serving import frozen as inference
from effformer.testing import randomise


class _Replay:
    """A graph's stand-in: replaying it computes into the first results, as a graph does."""

    def __init__(self, forward: Callable[[], Any]) -> None:
        self.forward, self.results, self.count = forward, forward(), 0

    def replay(self) -> None:
        self.count += 1
        for target, source in zip(listed(self.results), listed(self.forward()), strict=True):
            target.copy_(source)


@pytest.fixture
def graphed(monkeypatch: pytest.MonkeyPatch, narrow: Callable[..., EfficientFormer]) -> Callable[..., Any]:
    """A frozen narrow model on the CPU that believes in graphs."""

    def captured(forward: Callable[[], Any], pool: Any) -> Any:
        graph = _Replay(forward)
        return pool or object(), graph, graph.results

    def build(max_graphs: int, **options: Any) -> Any:
        model = narrow()
        frozen = freeze(model, torch.float64, mean=MEAN, std=STD, **options)
        frozen._max_graphs = max_graphs
        return model, frozen

    monkeypatch.setattr(inference, "capture_graph", captured)
    return build


def test_one_graph_for_each_shape_up_to_the_limit(graphed: Callable[..., Any]) -> None:
    model, frozen = graphed(3)
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    for _ in range(2):
        for shape in ((2, 64, 64), (1, 64, 64), (1, 96, 64), (4, 64, 64)):
            x = torch.randn(shape[0], 3, *shape[1:], dtype=torch.float64)
            close(frozen(x), live(model, "logits", x))
        close(frozen(pixels), live(model, "logits", normalised(pixels)))
    assert frozen.graphs == ((2, 64, 64, False), (1, 64, 64, False), (1, 96, 64, False))
    biases = [{bias.data_ptr() for bias in graph.biases} for graph in frozen._graphs.values()]
    assert biases[0] == biases[1]
    assert not biases[0] & biases[2]
    assert [graph.graph.count for graph in frozen._graphs.values()] == [2, 2, 2]
    assert frozen.held_bytes == 8 * (3 * 64 * (2 * 64 + 64 + 96) + 4 * 10)
    pool = frozen._pool
    frozen.clear()
    assert frozen.graphs == ()
    close(frozen(pixels), live(model, "logits", normalised(pixels)))
    assert frozen.graphs == ((1, 64, 64, True),)
    assert frozen._pool is not pool


def test_padding_up_to_a_captured_batch(graphed: Callable[..., Any]) -> None:
    model, frozen = graphed(2, when_full="pad", output="features")
    frozen.capture((4, 64, 64), (8, 64, 64))
    for batch in (3, 4, 5, 1, 8):
        x = torch.randn(batch, 3, 64, 64, dtype=torch.float64)
        close(frozen(x), live(model, "features", x))
    assert [graph.graph.count for graph in frozen._graphs.values()] == [3, 2]
    for shape in ((9, 3, 64, 64), (2, 3, 96, 64), (0, 3, 64, 64)):
        x = torch.randn(shape, dtype=torch.float64)
        found = frozen(x)
        if shape[0]:
            close(found, live(model, "features", x))
        else:
            assert [f.shape[0] for f in found] == [0] * 4
    assert [graph.graph.count for graph in frozen._graphs.values()] == [3, 2]
    with pytest.raises(ValueError, match="allowed are 2 graphs"):
        frozen.capture((16, 64, 64))
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    close(frozen(pixels), live(model, "features", normalised(pixels)))  # not in a graph of float images


def test_results_are_new_unless_asked_otherwise(graphed: Callable[..., Any]) -> None:
    x, y = torch.randn(2, 1, 3, 64, 64, dtype=torch.float64)
    _, frozen = graphed(1)
    first = frozen(x)
    kept = first.clone()
    frozen(y)
    assert torch.equal(first, kept)
    _, frozen = graphed(1, new_outputs=False)
    first = frozen(x)
    assert torch.equal(frozen(y), first)
    assert not torch.equal(first, kept)
    _, frozen = graphed(1, new_outputs=False, when_full="pad")
    frozen.capture((3, 64, 64))
    close(frozen(x), kept)


def test_images_may_be_written_where_the_graph_reads_them(graphed: Callable[..., Any]) -> None:
    model, frozen = graphed(2)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    buffer = frozen.input_buffer(2, 64, 64)
    buffer.copy_(x)
    written = buffer._version
    close(frozen(buffer), live(model, "logits", x))
    assert buffer._version == written
    with pytest.raises(RuntimeError, match="single memory location"):
        frozen(buffer.transpose(2, 3))  # the same memory and shape, other images: not to be taken for the buffer
    pixels = frozen.input_buffer(1, 64, 32, uint8=True).permute(0, 2, 3, 1)
    pixels.random_(0, 256)
    close(frozen(pixels), live(model, "logits", normalised(pixels.permute(0, 3, 1, 2))))


def test_graphs_may_change_while_they_are_looked_at(graphed: Callable[..., Any]) -> None:
    """By other threads, which capture and clear."""
    _, frozen = graphed(8)
    frozen.capture((1, 32, 32), (2, 32, 32))
    bytes_held = frozen.held_bytes

    class Changing(dict[Any, Any]):
        def __getitem__(self, key: Any) -> Any:
            other = threading.Thread(target=self.clear_unlocked)
            other.start()
            other.join()
            return super().__getitem__(key)

        def clear_unlocked(self) -> None:
            if frozen._lock.acquire(blocking=False):
                self.clear()
                frozen._lock.release()

    class Graph:
        def __init__(self, graph: Any, added: int) -> None:
            self.results, self._images, self.added = graph.results, graph.images, added

        @property
        def images(self) -> Tensor:
            frozen._graphs[self.added, 32, 32, False] = self
            return self._images

    frozen._graphs = Changing(frozen._graphs)
    assert frozen.input_buffer(2, 32, 32).shape == (2, 3, 32, 32)
    frozen._graphs = {key: Graph(graph, key[0] + 2) for key, graph in frozen._graphs.items()}
    assert frozen.held_bytes == bytes_held
    assert len(frozen.graphs) == 4


def test_new_weights_reach_graphs(graphed: Callable[..., Any]) -> None:
    """Also the bias, which each graph has for its own size."""
    model, frozen = graphed(2)
    images = [torch.randn(1, 3, 64, side, dtype=torch.float64) for side in (64, 96, 160)]
    for x in images:
        frozen(x)
    randomise(model, seed=1)
    frozen.refresh()
    for x in images:
        close(frozen(x), live(model, "logits", x))
    assert len(frozen.graphs) == 2


def test_what_would_end_the_callers_capture_is_refused(
    graphed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, frozen = graphed(2)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    before = frozen(x)
    randomise(model, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(frozen, "_within_a_graph", lambda: True)
        for name, call in (
            ("capture", lambda: frozen.capture((2, 64, 64))),
            ("capture", lambda: frozen.input_buffer(1, 64, 96)),
            ("clear", frozen.clear),
            ("refresh", frozen.refresh),
        ):
            with pytest.raises(RuntimeError, match=f"{name}: called within the capture of a graph"):
                call()
    assert frozen.graphs == ((1, 64, 64, False),)
    assert torch.equal(frozen(x), before)


class _Cuda:
    """The parts of torch.cuda that `capture_graph` uses: the current stream, and the captures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current: list[Any] = [Mock(name="the caller's stream")]
        self.captures: list[tuple[Any, Any]] = []  # stream and pool
        self.capturing, self.most = 0, 0
        for name in ("Stream", "CUDAGraph", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, Mock(side_effect=lambda: Mock()))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current[-1])
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before = list(self.current)
        self.current.append(stream)
        try:
            yield
        finally:
            self.current[:] = before

    @contextlib.contextmanager
    def graph(self, graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.captures.append((stream, pool))
        self.capturing += 1
        self.most = max(self.most, self.capturing)
        self.current.append(stream)  # not taken back after an error, as in `torch.cuda.graph` where the capture ends so
        try:
            yield
        finally:
            self.capturing -= 1
        self.current.pop()


def test_graphs_of_one_pool_are_captured_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise graphs would share no memory: the allocator reuses it on the stream of its allocation only."""
    cuda = _Cuda(monkeypatch)
    pool = None
    for _ in range(3):
        pool, _, result = inference.capture_graph(lambda: cuda.current[-1], pool)
        assert result is cuda.captures[0][0]
    assert len(set(cuda.captures)) == 1
    inference.capture_graph(lambda: None, None)
    assert cuda.captures[0][0] is not cuda.captures[-1][0]
    assert cuda.captures[0][1] is not cuda.captures[-1][1]


def test_a_capture_that_fails_leaves_the_callers_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = _Cuda(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        inference.capture_graph(lambda: 1 // (1 - cuda.capturing), None)
    assert len(cuda.current) == 1
    assert cuda.capturing == 0


def test_one_capture_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all frozen models: PyTorch allows no more."""
    cuda = _Cuda(monkeypatch)
    threads = [
        threading.Thread(target=inference.capture_graph, args=(lambda: time.sleep(0.01), None)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cuda.captures) == 4
    assert cuda.most == 1


def test_a_callers_graph_reads_nothing_that_may_be_given_up(
    graphed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a kept bias, which other sizes and new weights drive out, nor one that only a replay computes is kept."""
    model, frozen = graphed(0)
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    read: list[list[Tensor]] = []
    run = frozen._packed.run
    monkeypatch.setattr(
        frozen._packed, "run", lambda x, biases, backend: read.append(biases) or run(x, biases, backend)
    )
    frozen(x)
    frozen(x)
    assert read[0] is read[1]
    monkeypatch.setattr(frozen, "_within_a_graph", lambda: True)
    close(frozen(x), live(model, "logits", x))
    frozen(x[..., :64])
    monkeypatch.undo()
    assert read[2] is not read[0]
    assert list(frozen._plans._sizes) == [(64, 96)]
    assert frozen._plans._sizes[64, 96].biases is read[0]


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("output", ["logits", "features"])
@pytest.mark.parametrize("feature_norm", [None, "tap"])
def test_results_that_callers_hold_lie_outside_the_graphs_pool(
    narrow: Callable[..., EfficientFormer],
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    output: str,
    feature_norm: str | None,
) -> None:
    """A capture allocates from the graphs' pool, and another shape's replay may write over its memory."""
    before: list[list[int]] = []

    def captured(forward: Callable[[], Any], pool: Any) -> Any:
        results = [listed(forward()) for _ in range(2)]
        assert [[one.data_ptr() for one in found] for found in results] == [[one.data_ptr() for one in results[0]]] * 2
        before.append([one.data_ptr() for one in results[0]])
        return object(), _Replay(forward), forward()

    monkeypatch.setattr(inference, "capture_graph", captured)
    model = narrow(dtype=torch.float32, feature_norm=feature_norm)
    frozen = freeze(model, torch.float32, output=output, backend=backend, new_outputs=False)
    frozen._max_graphs = 2
    images = torch.randn(2, 3, 64, 64)
    found = frozen(images)
    assert [one.data_ptr() for one in listed(found)] == before[0]
    frozen(torch.randn(1, 3, 64, 64))
    close(found, live(model, output, images), 1e-4)
    assert not set(before[0]) & set(before[1])


def test_capture_says_what_it_cannot(narrow: Callable[..., EfficientFormer], graphed: Callable[..., Any]) -> None:
    frozen = freeze(narrow(), torch.float64)
    with pytest.raises(ValueError, match="allowed are 0 graphs"):  # there is no GPU
        frozen.capture((1, 64, 64))
    with pytest.raises(ValueError, match="without mean and std"):
        frozen.capture((1, 64, 64), uint8=True)
    _, frozen = graphed(2)
    with pytest.raises(ValueError, match="shapes: got 0"):
        frozen.capture((0, 64, 64))
    for shapes in ((64, 64, 64), ((64, 64),), ((1, 64, 64, 3),)):
        with pytest.raises(ValueError, match=r"shapes: got .*, allowed are \(batch, height, width\)"):
            frozen.capture(*shapes)
    assert frozen.graphs == ()


def test_published_networks_are_frozen_whole() -> None:
    """The operations of each, counted: 2 + 3 convolutions, depths, one end."""
    for name in effformer.list_models():
        model = effformer.create_model(name, device="meta").eval()
        config: EfficientFormerConfig = model.config
        frozen = freeze(model)
        steps = [step.operation for step in frozen._packed.steps]
        assert steps.count("conv_norm") == 5
        assert steps.count("meta4d") == sum(config.depths) - config.num_vit
        assert steps.count("attention_mixer") == steps.count("linear_mlp") == config.num_vit
        assert steps.count("head") == 1
        assert len(steps) == 5 + sum(config.depths) + config.num_vit + 2


@pytest.mark.parametrize(("batch", "launches"), [(1, 38), (256, 34)])
def test_nothing_but_kernels_between_images_and_logits(batch: int, launches: int) -> None:
    """L1 on Triton: what stands between the kernels moves no memory. They are only described here, and not run."""
    frozen = freeze(effformer.create_model("efficientformer_l1").eval(), torch.float16, backend="triton")
    x = torch.empty(batch, 3, 224, 224, dtype=torch.float16)
    with recorded(run=False) as record:
        frozen(x)  # expands the bias
    record.clear()
    with recorded(run=False) as record, torch.profiler.profile() as profile:
        frozen(x)
    assert len(record) == launches
    record.clear()
    seen = {event.name for event in profile.events() if event.name.startswith("aten::")}
    views = {"view", "permute", "transpose", "flatten", "reshape", "as_strided", "detach", "alias", "contiguous"}
    views |= {"to", "unsqueeze", "_reshape_alias", "empty", "empty_strided", "result_type"}
    assert {name.removeprefix("aten::") for name in seen} <= views
