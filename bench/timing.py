"""Wall time of a callable, on a CPU or a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: 20th, 50th and 80th percentile over `repeats` calls after a warm-up."""

    p20: float
    p50: float
    p80: float
    repeats: int


def measure(
    call: Callable[[], object], device: torch.device, *, least_repeats: int = 5, least_seconds: float = 0.5
) -> Timing:
    """Time `call`, each run from an idle device to an idle device.

    Args:
        call: what to time; called twice before the clock starts.
        device: where it computes; a CUDA device is synchronised around each run.
        least_repeats, least_seconds: stop once both are reached.
    """

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(2):
        call()
    synchronise()
    times: list[float] = []
    while len(times) < max(least_repeats, 2) or sum(times) < least_seconds:
        start = time.perf_counter()
        call()
        synchronise()
        times.append(time.perf_counter() - start)
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(1e3 * deciles[1], 1e3 * deciles[4], 1e3 * deciles[7], len(times))


def kernel_time(call: Callable[[], object], device: torch.device) -> float:
    """Median milliseconds of `call`; on a GPU device time by CUDA events, with nothing of an earlier run in L2.

    There `call` is captured in a CUDA graph, so that the time to launch does not count; it must not allocate.
    """
    if device.type != "cuda":
        return measure(call, device).p50
    from triton.testing import do_bench

    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()  # what is compiled or loaded at the first call is not for a graph
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        found: float = do_bench(graph.replay, warmup=10, rep=50, return_mode="median")
    return found
