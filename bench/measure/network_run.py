"""Measure one provider of a network. process.py runs it in a process of its own: JOB TARGET are JSON and a file's name.

Memory, compiled code and crashes of one provider then touch no other. The figures are written to TARGET as JSON.
"""

from __future__ import annotations

import functools
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
from .ceilings import measure_ceilings, speed
from .network_providers import BY_NAME, Measurement, NetworkProvider, build, draw_images, exact_network
from .profile import details_of, doubts, watched_freezing
from .roofline import network_least_time
from .timing import Timing, measure, synchronise

WARM_UP = 5  # calls; Inductor's graphs warm up, are captured, and are replayed from the third on
LEAST_CALLS, LEAST_SECONDS = 10, 2.0  # of synchronised calls
ROUNDS, ROUND_SECONDS = 5, 0.3  # of calls without waiting between them
COMPARED = {"cuda": 64, "cpu": 16}  # images at least, whose likeliest class is compared with float32's
EXACT = 4  # images at the head and as many at the tail of those, which are compared with float64
MIB = 1 << 20


@dataclass
class Figures:
    """Figures of a provider: metric -> p20, p50, p80, the outer two None where it was measured once."""

    metrics: dict[str, Sequence[Any]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)

    def put(self, metric: str, p50: float, p20: float | None = None, p80: float | None = None) -> None:
        self.metrics[metric] = p20, p50, p80


@torch.no_grad()
def compile_provider(provider: NetworkProvider, measurement: Measurement, device: torch.device) -> Figures:
    """Compile a provider, so that its code lies in Inductor's cache; the only figure is "compile s"."""
    _choose_algorithms()
    figures = Figures()
    images = draw_images(measurement, measurement.batch).to(device)
    if provider.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    start = time.perf_counter()
    with provider.compiling():
        network = build(provider, measurement, device)
        for _ in range(WARM_UP):
            network(images)
        synchronise(device)
    figures.put("compile s", time.perf_counter() - start)
    return figures


def _choose_algorithms() -> None:
    """Let cuDNN try all its algorithms: shapes are fixed; as in timm's own benchmark."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.benchmark_limit = 0


@torch.no_grad()
def measure_provider(
    provider: NetworkProvider, measurement: Measurement, device: torch.device, *, speed_alone: bool = False
) -> Figures:
    """All that is recorded of a provider; with `speed_alone` its latency and throughput."""
    _choose_algorithms()
    count = -(-COMPARED[device.type] // measurement.batch) * measurement.batch
    figures, drawn = Figures(), draw_images(measurement, count)
    layout = torch.channels_last if provider.channels_last else torch.contiguous_format
    images = drawn[: measurement.batch].to(device).contiguous(memory_format=layout)
    known = cached_files()
    with provider.compiling(), watched_freezing() as freezing:
        network: Any = build(provider, measurement, device)
        synchronise(device)
        start = time.perf_counter()
        network(images)
        synchronise(device)
        first = time.perf_counter() - start
        for _ in range(WARM_UP - 1):
            network(images)
        synchronise(device)
        warm_up = time.perf_counter() - start
    if provider.options is not None:  # few, where another provider or an earlier run has compiled the same
        figures.details["files compiled"] = cached_files() - known
    call = functools.partial(network, images)
    if device.type == "cuda" and not speed_alone:
        peak, memory = peak_memory(call, device, getattr(network, "held_bytes", 0))
        figures.put("peak MiB", peak)
        figures.details |= memory
    latency = measure(call, device, least_repeats=LEAST_CALLS, least_seconds=LEAST_SECONDS)
    figures.put("ms", latency.p50, latency.p20, latency.p80)
    figures.put("p99 ms", latency.p99)
    p20, p50, p80 = speed(measurement.batch, throughput(call, latency.p50, device))
    figures.put("img/s", p50, p20, p80)
    if speed_alone:
        return figures
    figures.put("first call s", first)
    figures.put("compile s", max(0.0, warm_up - WARM_UP * latency.p50 / 1e3))
    figures.details |= {"calls": latency.repeats, **details_of(provider, network, images, freezing)}
    figures.doubts = doubts(provider, figures.details, device)

    chunks = (chunk.to(device).contiguous(memory_format=layout) for chunk in drawn.split(measurement.batch))
    logits = torch.cat([network(chunk).to("cpu", copy=True) for chunk in chunks])
    del network, call  # frees its memory for the two of `agreement`
    for metric, value in agreement(measurement, drawn, logits, device).items():
        figures.put(metric, value)
    if provider.whose == "frozen":
        size, dtype = (measurement.height, measurement.width), measurement.torch_dtype
        ceilings = measure_ceilings(device, dtype).ceilings
        least = network_least_time(PRESETS[measurement.model], measurement.batch, size, dtype, ceilings)
        figures.details |= {"roofline ms": 1e3 * least, **asdict(ceilings)}
    return figures


def cached_files() -> int:
    """The number of files in Inductor's cache, which providers share."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return sum(path.is_file() for path in Path(folder).rglob("*")) if folder else 0


def throughput(call: Callable[[], object], ms: float, device: torch.device) -> Timing:
    """Time of a call where calls do not wait for each other, by rounds of many. `ms` is the time of one alone."""
    calls, rounds = max(3, round(1e3 * ROUND_SECONDS / ms)), []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronise(device)
        rounds.append(1e3 * (time.perf_counter() - start) / calls)
    return Timing.of(rounds)


def peak_memory(call: Callable[[], object], device: torch.device, held: int = 0) -> tuple[float, dict[str, float]]:
    """Peak MiB of a call after warming up, and its parts.

    A replayed graph allocates nothing: its memory is a private pool, which is reserved for good and counts as free.
    Hence the peak of allocated memory, and the free part of private pools. "activations MiB" is that less the memory
    allocated between calls: weights (frozen ones, too) and images, but not the `held` bytes, a graph's own inputs and
    results, since Inductor's lie in its pool. Memory for compiling does not count, "warm-up MiB" has it.
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
    parts = {"activations MiB": peak - rest + held, "rest MiB": rest, "pools MiB": pools, "warm-up MiB": warm_up}
    return peak / MIB, {name: round(size / MIB, 2) for name, size in parts.items()}


def pool_bytes(segments: Sequence[Any], device: int) -> int:
    """The bytes of private pools that no tensor has."""
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in segments
        if segment["device"] == device and tuple(segment["segment_pool_id"]) != (0, 0)
    )


@torch.no_grad()
def agreement(measurement: Measurement, images: Tensor, logits: Tensor, device: torch.device) -> dict[str, float]:
    """Errors against float64 with the same weights, relative to its largest; likeliest classes shared with float32.

    Float32 has the weights from before they were rounded. Errors are those of the first and the last images.
    """
    ends = torch.cat([images[:EXACT], images[-EXACT:]]).to(device, torch.float64)
    exact = exact_network(measurement, torch.float64, device)(ends).cpu()
    errors = (torch.cat([logits[:EXACT], logits[-EXACT:]]).double() - exact).abs() / exact.abs().max()
    network = exact_network(measurement, torch.float32, device)
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
    """End this process and all that it started when `parent` ends, however that comes about."""

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
    provider, measurement = BY_NAME[wanted["provider"]], Measurement(*wanted["measurement"])
    if wanted["part"] == "compile":
        figures = compile_provider(provider, measurement, device)
    else:
        figures = measure_provider(provider, measurement, device, speed_alone=wanted["part"] == "speed")
    Path(target).write_text(json.dumps(asdict(figures)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
