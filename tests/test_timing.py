"""Timing on a CPU and on a fake GPU: replays advance its clock, and it remembers the calls in their order."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from effformer.bench.measure import timing
from effformer.bench.measure.timing import Rotation, Timing, device_time, kernel_time, measure

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_percentiles() -> None:
    assert Timing.of([float(n) for n in range(101)]) == Timing(20.0, 50.0, 80.0, 99.0, 101)


def test_wall_time_of_a_cpu() -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.02)

    found = measure(call, CPU, least_repeats=7, least_seconds=0.0)
    assert found.repeats == 7
    assert calls == 2 + 7
    assert 20 <= found.p20 <= found.p50 <= found.p80 <= found.p99
    assert kernel_time(call, CPU) >= 20


def test_garbage_is_not_collected_while_the_clock_runs() -> None:
    seen = []
    measure(lambda: seen.append(gc.isenabled()), CPU, least_repeats=3, least_seconds=0.0)
    assert seen == [True, True, False, False, False]
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        measure(lambda: seen.append(1) if len(seen) < 8 else 1 / 0, CPU)
    assert gc.isenabled()


def counted() -> tuple[Callable[[], Callable[[], Any]], list[int]]:
    """(make, the numbers of the calls that it made, as they were called)."""
    made, called = 0, []

    def make() -> Callable[[], Any]:
        nonlocal made
        number, made = made, made + 1

        def call() -> SimpleNamespace:
            called.append(number)
            return SimpleNamespace()

        return call

    return make, called


def test_a_rotation_is_three_times_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "CPU_CACHE", 1000)
    make, called = counted()
    rotation = Rotation(make, CPU, 900)  # 3000 bytes are four of these
    assert len(rotation.times(6)) == 6
    assert called == [0, 1, 2, 3, 0, 1], "each in its turn, also from one measurement to the next"
    assert len(Rotation(make, CPU, 10**9).calls) == 2, "the weights of the only one would be cached"
    for name, value in {"LEAST_REPEATS": 3, "LEAST_SECONDS": 0.0}.items():
        monkeypatch.setattr(timing, name, value)
    assert device_time(make, CPU, 900).repeats == 3


class Gpu:
    """torch.cuda's streams, graphs and events, with a clock in milliseconds instead of a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: float, cache: int) -> None:
        gpu = self
        self.now, self.capturing, self.replays, self.synchronised = 0.0, False, 0, False

        class Graph:
            def replay(self) -> None:
                gpu.replays += 1
                # the first keeps the device waiting for its launch, as a real one does
                gpu.now += cost * gpu.in_graph + (50.0 if gpu.replays == 1 or gpu.idle else 0.0)
                gpu.idle = False

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now
                gpu.synchronised = False

            def elapsed_time(self, other: Any) -> float:
                assert gpu.synchronised
                return other.at - self.at

        @contextlib.contextmanager
        def graph(found: Graph) -> Iterator[None]:
            assert gpu.warm, "the first use is not for a graph"
            gpu.capturing = True
            yield
            gpu.capturing = False

        def synchronize(device: torch.device) -> None:
            gpu.synchronised = gpu.idle = True

        self.idle, self.warm, self.in_graph = True, False, 0
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "CUDAGraph": Graph,
            "Event": Event,
            "graph": graph,
            "synchronize": synchronize,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda of: contextlib.nullcontext(),
            "device": lambda of: contextlib.nullcontext(),
            "get_device_properties": lambda of: SimpleNamespace(L2_cache_size=cache),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def called(self) -> None:
        self.warm |= not self.capturing
        self.in_graph += self.capturing


class Result:
    """Of a call: counts how many live at a time."""

    def __init__(self, live: list[int]) -> None:
        self.live = live
        live.append(live[-1] + 1)

    def __del__(self) -> None:
        self.live.append(self.live[-1] - 1)


@pytest.mark.parametrize(("footprint", "copies", "calls"), [(1000, 3, 12), (100, 30, 30), (5000, 2, 10)])
def test_device_time(monkeypatch: pytest.MonkeyPatch, footprint: int, copies: int, calls: int) -> None:
    gpu = Gpu(monkeypatch, cost=0.25, cache=1000)
    make, called = counted()
    live = [0]

    def made() -> Callable[[], object]:
        call = make()

        def counted_call() -> Result:
            gpu.called()
            call()
            return Result(live)

        return counted_call

    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.0)
    found = device_time(made, CUDA, footprint)
    assert found == Timing(0.25, 0.25, 0.25, 0.25, 5), "of one call; without the launch that an idle device waits for"
    assert gpu.in_graph == calls
    assert called == [0, *[index % copies for index in range(calls)]]
    assert max(live) >= copies, "results do not share memory"
    assert gpu.replays == (1 + 2) + (1 + 5)


def test_one_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, cost=0.5, cache=1000)
    testing = pytest.importorskip("triton.testing")

    def do_bench(replay: Callable[[], None], **options: Any) -> float:
        before = gpu.now
        gpu.idle = False
        gpu.replays = 1
        replay()
        return gpu.now - before

    monkeypatch.setattr(testing, "do_bench", do_bench)
    assert kernel_time(gpu.called, CUDA) == 0.5
    assert (gpu.warm, gpu.in_graph) == (True, 1)
