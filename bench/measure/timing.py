"""Time of a callable: by the wall clock, or of the device alone with a cold cache."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

COLD = 3  # the arguments of a rotation are this many times as large as the cache
LEAST_REPEATS, LEAST_SECONDS = 5, 0.2  # of `device_time`, which stops once both are reached
LEAST_CALLS = 10  # in a graph, so that the time to start one hardly counts
CPU_CACHE = 64 * 2**20  # bytes: PyTorch does not know a CPU's


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: 20th, 50th, 80th and 99th percentile over `repeats` measurements after a warm-up."""

    p20: float
    p50: float
    p80: float
    p99: float
    repeats: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Timing:
        """Percentiles of two or more times in milliseconds."""
        cuts = statistics.quantiles(times, n=100, method="inclusive")
        return cls(cuts[19], cuts[49], cuts[79], cuts[98], len(times))


def synchronise(device: torch.device) -> None:
    """Wait for a GPU; a CPU has finished what was called."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    call: Callable[[], object], device: torch.device, *, least_repeats: int = 5, least_seconds: float = 0.5
) -> Timing:
    """Time `call`, each run from an idle device to an idle device, without garbage collection.

    Args:
        call: is called twice before the clock starts.
        device: where it computes; a CUDA device is synchronised around each run.
        least_repeats, least_seconds: stop once both are reached.
    """
    for _ in range(2):
        call()
    synchronise(device)
    times: list[float] = []
    total = 0.0  # milliseconds
    gc.collect()
    gc.disable()
    try:
        while len(times) < max(least_repeats, 2) or total < 1e3 * least_seconds:
            times.append(_wall_time(call, device))
            total += times[-1]
    finally:
        gc.enable()
    return Timing.of(times)


def _wall_time(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    synchronise(device)
    return 1e3 * (time.perf_counter() - start)


def device_time(make: Callable[[], Callable[[], object]], device: torch.device, footprint: int) -> Timing:
    """Device time of one call in a `Rotation`, which explains `make`, `device` and `footprint`.

    On a GPU each time is the mean over one round of the rotation; launching from Python does not count.
    """
    rotation = Rotation(make, device, footprint)
    rotation.times(2)
    times: list[float] = []
    end = time.perf_counter() + LEAST_SECONDS
    while len(times) < LEAST_REPEATS or time.perf_counter() < end:
        times += rotation.times(LEAST_REPEATS if device.type == "cuda" else 1)
    return Timing.of(times)


Timer = Callable[[Callable[[], Callable[[], object]], torch.device, int], Timing]  # such as `device_time`


class Rotation:
    """The same call on copies of its arguments, one after another, so that none finds its arguments in the cache.

    The copies are `COLD` times as large as the cache, two at least. On a GPU a round of them is captured in a CUDA
    graph, where every call writes its result to memory of its own.

    Args:
        make: returns a call on a new copy of its arguments, whose first use is not timed; on a GPU one that a graph
            can capture.
        device: where it computes.
        footprint: bytes of the arguments and the result of one call, 1 or more.
    """

    def __init__(self, make: Callable[[], Callable[[], object]], device: torch.device, footprint: int) -> None:
        copies = max(2, -(-COLD * cache_size(device) // footprint))
        self.device = device
        self.calls = [make() for _ in range(copies)]
        self._turns = itertools.cycle(self.calls)
        self._round = copies * -(-LEAST_CALLS // copies)
        self._graph = captured(self.calls, self._round, device) if device.type == "cuda" else None

    def times(self, repeats: int) -> list[float]:
        """Milliseconds of one call, `repeats` times: on a GPU of a round of them each, by CUDA events."""
        if self._graph is None:
            return [_wall_time(call, self.device) for call in itertools.islice(self._turns, repeats)]
        with torch.cuda.device(self.device):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
            self._graph.replay()  # keeps the device busy while the next one is launched
            for event in events[:-1]:
                event.record()
                self._graph.replay()
            events[-1].record()
            torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / self._round for start, end in itertools.pairwise(events)]


def cache_size(device: torch.device) -> int:
    """Bytes of a GPU's L2 cache; `CPU_CACHE` for a CPU."""
    if device.type != "cuda":
        return CPU_CACHE
    return torch.cuda.get_device_properties(device).L2_cache_size


def captured(calls: Sequence[Callable[[], object]], total: int, device: torch.device) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `total` calls, taken from `calls` in turns, after a first use of one of them.

    A result keeps its memory until as many others were computed, so that none is written to lines still in the cache.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            calls[0]()  # compiles and loads outside of the graph
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        results: deque[object] = deque(maxlen=len(calls))
        with torch.cuda.graph(graph):
            for index in range(total):
                results.append(calls[index % len(calls)]())
    return graph


def kernel_time(call: Callable[[], object], device: torch.device) -> float:
    """Median milliseconds of `call`, on a GPU by CUDA events and with L2 overwritten before each.

    There `call` is captured in a CUDA graph, so that the time to launch does not count; it must not allocate.
    """
    if device.type != "cuda":
        return measure(call, device).p50
    from triton.testing import do_bench

    graph = captured([call], 1, device)
    with torch.cuda.device(device):
        found: float = do_bench(graph.replay, warmup=10, rep=50, return_mode="median")
    return found
