"""Measure whole networks: the work of `effformer bench`.

A measurement (`network_providers.Measurement`) holds the results of all its providers, timm's network in several forms
and ours. They take turns on one machine, and each is written to the results file at once.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from .network_providers import Measurement, NetworkProvider, providers_of
from .network_run import Figures
from .process import Part, in_process
from .records import Record
from .resume import FailedError, ResultsFile

FILE = "networks.jsonl"
MODELS = ("efficientformer_l1", "efficientformer_l3", "efficientformer_l7")
DTYPES = ("bfloat16", "float16", "float32")
FIRST_BATCHES = (256, 1)
DRIFT = 0.05  # between the first provider's time and the same at the end, from which on a remark says so

CORES = 4  # for each provider that is compiled beside others

Run = Callable[[NetworkProvider, Measurement, Part], Figures]


def in_order(
    models: Sequence[str], batches: Sequence[int], dtypes: Sequence[str], sizes: Sequence[tuple[int, int]]
) -> list[Measurement]:
    """All measurements, the most telling first.

    Image sizes as given, of each bfloat16 first, of each batches 256 and 1 before others, of each the smallest model.
    """

    def place(one: Measurement) -> tuple[int, ...]:
        model, first = MODELS.index(one.model), one.batch in FIRST_BATCHES
        ranks = (model, FIRST_BATCHES.index(one.batch)) if first else (batches.index(one.batch), model)
        return sizes.index((one.height, one.width)), DTYPES.index(one.dtype), not first, *ranks

    found = itertools.product(models, batches, dtypes, sizes)
    return sorted({Measurement(model, batch, dtype, *size) for model, batch, dtype, size in found}, key=place)


def chosen(measurement: Measurement, providers: Sequence[str] | None) -> list[NetworkProvider]:
    """The providers of a measurement that were asked for (None: all), in the order in which they are measured.

    Ours frozen comes first, and the strongest baselines next.
    """
    found = [one for one in providers_of(measurement) if providers is None or one.name in providers]
    return sorted(found, key=lambda one: (one.whose != "frozen", not one.options, one.options is None))


def is_complete(measurement: Measurement, file: ResultsFile, providers: Sequence[str] | None = None) -> bool:
    """Whether every provider has a result, and the first was measured again after the last."""
    records = file.records(measurement.key)
    names = [provider.name for provider in chosen(measurement, providers)]
    if not set(names) <= file.providers(measurement.key):
        return False
    first = _first(records, names)
    newest = max((record.machine.date for record in records if record.provider in names), default="")
    return first is None or ("again" in first.details and first.machine.date >= newest)


def measure_networks(
    todo: Sequence[Measurement],
    file: ResultsFile,
    device: torch.device,
    *,
    run: Run | None = None,
    providers: Sequence[str] | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> Iterator[list[Record]]:
    """Measure the incomplete ones in order until the time of `file` is over; yield each measurement's records.

    All forms that torch.compile makes are compiled side by side before any of them is measured: it takes minutes.

    Args:
        file: takes each provider's records when it is done.
        run: measures a provider; by default in a process of its own.
        providers: names; by default all.
        tell: is told each provider as it starts.
    """
    run = run or functools.partial(in_process, device=device)
    for measurement in todo:
        if is_complete(measurement, file, providers):
            continue
        finished = _measure(measurement, file, device, run, chosen(measurement, providers), tell)
        if records := file.records(measurement.key):
            yield records
        if not finished:
            return


def _measure(
    measurement: Measurement,
    file: ResultsFile,
    device: torch.device,
    run: Run,
    providers: Sequence[NetworkProvider],
    tell: Callable[[str], object],
) -> bool:
    """Measure the providers without a result, and the first of all again; False if the time was over before."""
    known = file.providers(measurement.key)
    able = [one for one in providers if one.name not in known and one.why_not(measurement, device) is None]
    compiled: dict[str, Figures] | None = None
    for provider in providers:
        if compiled is None and provider in able and provider.options is not None:
            if time.monotonic() > file.deadline:
                return False
            compiled = _compile(able, measurement, run, tell)
        ahead = (compiled or {}).get(provider.name)

        def figures(provider: NetworkProvider = provider, ahead: Figures | None = ahead) -> list[Record]:
            tell(f"{measurement}: {provider.name} ...")
            found = run(provider, measurement, "all")
            if ahead is not None:
                found.metrics |= ahead.metrics
                found.details |= ahead.details
            return _records(measurement.begun(provider, file.machine), found)

        begun = measurement.begun(provider, file.machine)
        if not file.measure(begun, figures, provider.why_not(measurement, device)):
            return False
    names = {provider.name: provider for provider in providers}
    first = _first(file.records(measurement.key), list(names))
    if first is None:
        return True
    if time.monotonic() > file.deadline:
        return False
    tell(f"{measurement}: {first.provider}, again ...")
    again: Figures | str
    try:
        again = run(names[first.provider], measurement, "speed")
    except (FailedError, TimeoutError) as error:
        again = str(error) or "it took too long"
    old = [record for record in file.records(measurement.key) if record.provider == first.provider]
    file.add(_drifted(replace(record, machine=file.machine), again) for record in old)
    return True


def _compile(
    providers: Sequence[NetworkProvider], measurement: Measurement, run: Run, tell: Callable[[str], object]
) -> dict[str, Figures]:
    """Compile providers side by side, as many as there are cores for; name -> figures of those that succeeded."""
    waiting = [provider for provider in providers if provider.options is not None]
    workers = min(len(waiting), (os.cpu_count() or 1) // CORES)
    if workers < 2:
        return {}
    tell(f"{measurement}: compiling {len(waiting)} providers, {workers} at a time ...")
    found: dict[str, Figures] = {}

    def compile_one(provider: NetworkProvider) -> None:
        with contextlib.suppress(FailedError, TimeoutError):  # measuring it will say so
            found[provider.name] = run(provider, measurement, "compile")
            found[provider.name].details["compiled beside others"] = workers - 1

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(compile_one, waiting))
    return found


def _first(records: Sequence[Record], names: Sequence[str]) -> Record | None:
    """The "ms" of the first of these providers that has one."""
    found = {record.provider: record for record in records if record.metric == "ms"}
    return next((found[name] for name in names if name in found), None)


def _records(begun: Record, figures: Figures) -> list[Record]:
    return [
        replace(
            begun,
            metric=metric,
            p50=p50,
            p20=p20,
            p80=p80,
            roofline=of_roofline(figures, begun.shape[0], metric, p50),
            why="; ".join(figures.doubts) or None,
            details=figures.details if metric == "ms" else {},
        )
        for metric, (p20, p50, p80) in figures.metrics.items()
    ]


def _drifted(record: Record, again: Figures | str) -> Record:
    """The slower of the first provider's record and its second measurement, so that a drift does not favour it."""
    if record.metric not in ("ms", "p99 ms", "img/s"):
        return record
    if isinstance(again, str):
        return replace(record, details={**record.details, "again": None}, why=f"again at the end: {again}")
    p20, p50, p80 = again.metrics[record.metric]
    before = record.details.get("first", record.p50)
    drift = p50 / before - 1
    remark = f"the machine drifted: {drift:+.0%} at the end of the measurement" if abs(drift) > DRIFT else None
    found = replace(
        record,
        details={**record.details, "first": before, "again": p50, "drift": round(drift, 4)},
        why="; ".join(filter(None, (record.why, remark))) or None,
    )
    slowdown = record.p50 / p50 if record.metric == "img/s" else p50 / record.p50
    if slowdown <= 1:
        return found
    return replace(found, p20=p20, p50=p50, p80=p80, roofline=record.roofline and record.roofline / slowdown)


def of_roofline(figures: Figures, batch: int, metric: str, p50: float) -> float | None:
    """The fraction of the roofline's speed, by ceilings measured in the same process; known of ours frozen alone."""
    least = figures.details.get("roofline ms", math.nan)
    if math.isnan(least) or metric not in ("ms", "img/s"):
        return None
    return least / p50 if metric == "ms" else least * p50 / (1e3 * batch)
