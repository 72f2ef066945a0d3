"""Measure one rung of the ladder. isolation.py runs it in a process of its own: JOB TARGET are JSON and a file's name.

Memory, compiled code and crashes of one rung then touch no other. The outcome is written to TARGET as JSON.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config import PRESETS
from ...testing import float32_as_such
from .ceilings import measure_ceilings
from .network_providers import BY_NAME, Cell, Provider, build, draw_images, exact_network
from .profile import doubts, evidence, watched_freezing
from .roofline import network_floor

WARM_UP = 5  # calls; Inductor's graphs warm up, are captured, and are replayed from the third on
LEAST_CALLS, MOST_CALLS = 10, 200
LEAST_SECONDS, MOST_SECONDS = 0.5, 4.0  # of synchronised calls
ROUNDS, ROUND_SECONDS = 5, 0.3  # of calls without waiting between them
COMPARED = {"cuda": 64, "cpu": 16}  # images at least, whose likeliest class is compared with float32's
EXACT = 4  # images at the head and as many at the tail of those, that are held against float64
MIB = 1 << 20


@dataclass
class Figures:
    """What came of a rung: metric -> (p20, p50, p80), the outer two None where it was measured once."""

    metrics: dict[str, tuple[float | None, float, float | None]] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)

    def put(self, metric: str, p50: float, p20: float | None = None, p80: float | None = None) -> None:
        self.metrics[metric] = p20, p50, p80


def quantile(values: Sequence[float], share: float) -> float:
    """By linear interpolation between the sorted values."""
    values = sorted(values)
    place = share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def measure_rung(provider: Provider, cell: Cell, device: torch.device, *, speed_alone: bool = False) -> Figures:
    """All that is recorded of a rung. With `speed_alone` its latency and throughput."""
    figures, drawn = Figures(), draw_images(cell, -(-COMPARED[device.type] // cell.batch) * cell.batch)
    logits = _run(provider, cell, drawn, device, figures, speed_alone=speed_alone)
    if logits is not None:
        for metric, value in agreement(cell, drawn, logits, device).items():
            figures.put(metric, value)
    if provider.whose == "frozen" and not speed_alone:
        size, dtype = (cell.height, cell.width), cell.torch_dtype
        ceilings = measure_ceilings(device, dtype).ceilings
        figures.evidence["floor ms"] = 1e3 * network_floor(PRESETS[cell.model], cell.batch, size, dtype, ceilings)
        figures.evidence |= asdict(ceilings)
    return figures


@torch.no_grad()
def _run(
    provider: Provider, cell: Cell, drawn: Tensor, device: torch.device, figures: Figures, *, speed_alone: bool
) -> Tensor | None:
    """Fill in what calls of a rung show; its logits for the drawn images, None with `speed_alone`."""
    on_gpu = device.type == "cuda"
    torch.backends.cudnn.benchmark = True  # shapes are fixed; as in timm's own benchmark
    torch.backends.cudnn.benchmark_limit = 0  # all algorithms are tried
    layout = torch.channels_last if provider.channels_last else torch.contiguous_format
    images = drawn[: cell.batch].to(device).contiguous(memory_format=layout)

    def synchronise() -> None:
        if on_gpu:
            torch.cuda.synchronize(device)

    known = cached_files()
    with provider.compiling(), watched_freezing() as frozen:
        built = build(provider, cell, device)
        synchronise()
        start = time.perf_counter()
        built.call(images)
        synchronise()
        first = time.perf_counter() - start
        for _ in range(WARM_UP - 1):
            built.call(images)
        synchronise()
        warm_up = time.perf_counter() - start
    if provider.options is not None:  # few, where another rung or an earlier run has compiled the same
        figures.evidence["files compiled"] = cached_files() - known

    if on_gpu and not speed_alone:
        peak, details = peak_memory(lambda: built.call(images), device, built.held_bytes)
        figures.put("peak MiB", peak)
        figures.evidence |= details
    times = latencies(lambda: built.call(images), synchronise)
    p20, p50, p80, p99 = (quantile(times, share) for share in (0.2, 0.5, 0.8, 0.99))
    figures.put("ms", p50, p20, p80)
    figures.put("p99 ms", p99)
    rates = [cell.batch / seconds for seconds in throughput(lambda: built.call(images), p50 / 1e3, device)]
    figures.put("img/s", quantile(rates, 0.5), quantile(rates, 0.2), quantile(rates, 0.8))
    if speed_alone:
        return None
    figures.put("first call s", first)
    figures.put("compile s", max(0.0, warm_up - WARM_UP * p50 / 1e3))
    figures.evidence |= {"calls": len(times), **evidence(provider, built, images, frozen)}
    figures.doubts = doubts(provider, figures.evidence, device)

    chunks = (chunk.to(device).contiguous(memory_format=layout) for chunk in drawn.split(cell.batch))
    return torch.cat([built.call(chunk).to("cpu", copy=True) for chunk in chunks])


def cached_files() -> int:
    """What Inductor has compiled so far and kept, in the processes that share its cache."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return sum(path.is_file() for path in Path(folder).rglob("*")) if folder else 0


def latencies(call: Callable[[], object], synchronise: Callable[[], object]) -> list[float]:
    """Milliseconds of calls, each from an idle device to an idle device."""
    times: list[float] = []
    total = 0.0
    gc.collect()
    gc.disable()  # a process that has compiled holds more objects: its pauses would be a rival's p99
    try:
        while total < LEAST_SECONDS or len(times) < (MOST_CALLS if total < MOST_SECONDS else LEAST_CALLS):
            start = time.perf_counter()
            call()
            synchronise()
            times.append(1e3 * (time.perf_counter() - start))
            total += times[-1] / 1e3
    finally:
        gc.enable()
    return times


def throughput(call: Callable[[], object], seconds: float, device: torch.device) -> list[float]:
    """Seconds a call where calls do not wait for each other, of each round. `seconds` is what one takes alone."""
    calls, rounds = max(3, round(ROUND_SECONDS / seconds)), []
    for _ in range(ROUNDS):
        if device.type != "cuda":
            start = time.perf_counter()
            for _ in range(calls):
                call()
            rounds.append((time.perf_counter() - start) / calls)
            continue
        with torch.cuda.device(device):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(calls):
                call()
            end.record()
            end.synchronize()
        rounds.append(begin.elapsed_time(end) / 1e3 / calls)
    return rounds


def peak_memory(call: Callable[[], object], device: torch.device, held: int = 0) -> tuple[float, dict[str, float]]:
    """Peak MiB of a call after warming up, and what it is made of.

    A replayed graph allocates nothing: what it works in lies in a pool of its own, which is reserved for good and
    counts as free. Hence the peak of what is allocated, and the free part of private pools. "activations MiB" is that
    less what is allocated between calls, weights (frozen ones, too) and images, but for the `held` bytes of it that
    are a graph's own inputs and results: Inductor's lie in its pool. What compiling took meanwhile does not count,
    "warm-up MiB" has it.
    """
    warm_up = torch.cuda.max_memory_allocated(device)
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    rest = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(3):
        call()
    torch.cuda.synchronize(device)
    pools = pool_bytes(torch.cuda.memory_snapshot(), device.index or 0)
    peak = torch.cuda.max_memory_allocated(device) + pools
    details = {"activations MiB": peak - rest + held, "rest MiB": rest, "pools MiB": pools, "warm-up MiB": warm_up}
    return peak / MIB, {name: round(size / MIB, 2) for name, size in details.items()}


def pool_bytes(segments: Sequence[Any], device: int) -> int:
    """The bytes of private pools that no tensor has."""
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in segments
        if segment["device"] == device and tuple(segment["segment_pool_id"]) != (0, 0)
    )


@torch.no_grad()
def agreement(cell: Cell, images: Tensor, logits: Tensor, device: torch.device) -> dict[str, float]:
    """Errors against float64 with the same weights, relative to its largest; likeliest classes shared with float32.

    Float32 has the weights that the rungs' were rounded from. Errors are those of the first and the last images.
    """
    ends = torch.cat([images[:EXACT], images[-EXACT:]]).to(device, torch.float64)
    exact = exact_network(cell, torch.float64, device)(ends).cpu()
    errors = (torch.cat([logits[:EXACT], logits[-EXACT:]]).double() - exact).abs() / exact.abs().max()
    network = exact_network(cell, torch.float32, device)
    with float32_as_such():
        likeliest = torch.cat(
            [network(chunk.to(device).float()).argmax(1).cpu() for chunk in images.split(COMPARED[device.type])]
        )
    return {
        "max error": errors.max().item(),
        "mean error": errors.mean().item(),
        "top-1 agreement": (logits.argmax(1) == likeliest).double().mean().item(),
    }


def _end_with(parent: int) -> None:
    """End this process and all that it started when `parent` does, however that came about."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main(job: str, target: str) -> None:
    wanted = json.loads(job)
    _end_with(wanted["parent"])
    device = torch.device(wanted["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    provider, cell = BY_NAME[wanted["provider"]], Cell(*wanted["cell"])
    figures = measure_rung(provider, cell, device, speed_alone=wanted["speed_alone"])
    Path(target).write_text(json.dumps(asdict(figures)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
