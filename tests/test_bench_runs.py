"""Runs over networks: their records, the next run that goes on from them, the table, the exit status."""

from __future__ import annotations

import math
import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.bench.measure import network_run, networks, resume
from effformer.bench.measure.network_providers import BY_NAME, Measurement, NetworkProvider, providers_of
from effformer.bench.measure.network_run import Figures
from effformer.bench.measure.networks import is_complete, measure_networks
from effformer.bench.measure.records import Machine, Record, read_records
from effformer.bench.measure.resume import FailedError, ResultsFile
from effformer.bench.report.comparison import compare
from effformer.bench.report.tables import as_text
from full_disk import full_disk
from measurements import ONE

from effformer.cli import main

CPU = torch.device("cpu")
HERE = Machine("cpu: none", "none", torch.__version__, "3", "1", "code", "abc", "2026-01-01T00:00:00+00:00")
LATER = replace(HERE, date="2026-01-02T00:00:00+00:00", commit="of results alone")


def figures(ms: float = 2.0, doubts: tuple[str, ...] = ()) -> Figures:
    found = Figures({}, {"kernels": 3}, [*doubts])
    for metric, p50 in {
        "ms": ms,
        "p99 ms": 2 * ms,
        "img/s": 2e3 / ms,
        "max error": 1e-3,
        "top-1 agreement": 1.0,
    }.items():
        found.put(metric, p50)
    return found


def results(folder: Path, machine: Machine = HERE, seconds: float = 1e3) -> ResultsFile:
    return ResultsFile(folder / "networks.jsonl", machine, time.monotonic() + seconds)


@pytest.fixture(autouse=True)
def few_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few to compile several providers at once."""
    monkeypatch.setattr(networks.os, "cpu_count", lambda: 2)


def run_one(file: ResultsFile, run: networks.Run, one: Measurement = ONE, **options: Any) -> list[Record]:
    """The records of one measurement, as far as it came."""
    found = list(measure_networks([one], file, CPU, run=run, **options))
    return found[0] if found else []


# --- records ----------------------------------------------------------------------------------------------------------


def test_every_provider_is_recorded_and_the_first_measured_again(tmp_path: Path) -> None:
    asked = []

    def run(provider: NetworkProvider, one: Measurement, part: str) -> Figures:
        asked.append((provider.name, part))
        return figures(2.4 if part == "speed" else 2.0)

    file = results(tmp_path)
    records = run_one(file, run)
    assert [asked[0], asked[-1]] == [("ours frozen", "all"), ("ours frozen", "speed")]
    assert [name for name, _ in asked[1:4]] == [
        "timm torch.compile max-autotune", "timm torch.compile max-autotune-pointwise",
        "timm torch.compile max-autotune-pointwise + conv_1x1_as_mm",
    ]  # fmt: skip
    assert is_complete(ONE, file)
    assert {record.provider for record in records} == {provider.name for provider in providers_of(ONE)}
    skipped = [record for record in records if record.metric == "not run"]
    assert {record.provider for record in skipped} == {"timm torch.compile max-autotune, captured", "ours triton"}
    assert all(math.isnan(record.p50) for record in skipped)
    assert {record.key for record in read_records(file.path)} == {ONE.key}


@pytest.mark.parametrize(("last", "slower"), [(2.5, 2.5), (1.6, 2.0)])
def test_the_slower_of_first_and_last_counts(last: float, slower: float, tmp_path: Path) -> None:
    def run(provider: NetworkProvider, one: Measurement, part: str) -> Figures:
        found = figures(last if part == "speed" else 2.0)
        found.details["roofline ms"] = 1.0
        return found

    records = {r.metric: r for r in run_one(results(tmp_path), run) if r.provider == "ours frozen"}
    ms, rate = records["ms"], records["img/s"]
    assert (ms.p50, records["p99 ms"].p50, rate.p50) == (slower, 2 * slower, 2e3 / slower)
    assert ms.roofline == rate.roofline == 1 / slower
    assert ms.details["drift"] == pytest.approx(last / 2 - 1)
    assert (ms.details["first"], ms.details["again"]) == (2.0, last)
    assert ms.why == f"the machine drifted: {last / 2 - 1:+.0%} at the end of the measurement"


def test_shares_of_the_roofline() -> None:
    found = figures()
    assert networks.of_roofline(found, 2, "ms", 2.0) is None
    found.details["roofline ms"] = 0.5
    shares = [networks.of_roofline(found, 2, metric, p50) for metric, p50 in (("ms", 2.0), ("img/s", 1e3))]
    assert shares == [0.25, 0.25]  # two images in 2 ms, and in 2 ms


def test_a_failing_provider_takes_no_other_with_it(tmp_path: Path) -> None:
    def run(provider: NetworkProvider, one: Measurement, part: str) -> Figures:
        if provider.name in ("ours eager", "timm eager"):
            raise FailedError("OutOfMemoryError: 3 MiB")
        return figures()

    file = results(tmp_path)
    records = run_one(file, run)
    reasons = {record.provider: record.why for record in records if record.metric == "not run"}
    assert reasons["timm eager"] == reasons["ours eager"] == "OutOfMemoryError: 3 MiB"
    assert len(reasons) == 4
    assert resume.failures(records) == [
        "efficientformer_l1 2x3x224x224 float32, ours eager: OutOfMemoryError: 3 MiB"
    ]  # a provider of timm's does not count
    assert run_one(file, run) == [], "an error is an outcome"


def test_a_provider_that_takes_too_long_is_started_twice(tmp_path: Path) -> None:
    starts = 0

    def run(provider: NetworkProvider, one: Measurement, part: str) -> Figures:
        nonlocal starts
        if provider.name == "timm torch.compile":
            starts += 1
            raise TimeoutError
        return figures()

    file = results(tmp_path)
    records = run_one(file, run)
    assert (starts, is_complete(ONE, file)) == (2, True)
    reasons = {record.provider: record.why for record in records if record.metric == "not run"}
    assert reasons["timm torch.compile"] == "it was started 2 times, and took too long or broke the process"


def test_the_second_start_may_succeed(tmp_path: Path) -> None:
    tried = set()

    def run(provider: NetworkProvider, one: Measurement, part: str) -> Figures:
        if provider.name not in tried:
            tried.add(provider.name)
            raise TimeoutError
        return figures()

    records = run_one(results(tmp_path), run, providers=["ours eager"])
    assert {record.metric for record in records} >= {"ms", "img/s"}


def test_what_takes_the_process_with_it_is_left_out_the_third_time(tmp_path: Path) -> None:
    """A killed process writes nothing after "begun"; Ctrl-C removes that line."""
    begun = ONE.begun(BY_NAME["timm eager"], HERE)
    stopped = replace(begun, why="stopped from outside")
    results(tmp_path).add([begun, begun, stopped])
    names = ["timm eager"]
    assert run_one(results(tmp_path), lambda *_: figures(), providers=names)[-1].metric == "ms"
    other = ONE.begun(BY_NAME["ours eager"], HERE)
    results(tmp_path).add([other, other])
    (record,) = run_one(results(tmp_path), lambda *_: figures(), providers=["ours eager"])[-1:]
    assert (record.metric, record.details["failed"]) == ("not run", [record.why])


def test_files_that_inductor_keeps_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    assert network_run.cached_files() == 0
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "ab").mkdir()
    for name in ("kernel.py", "ab/kernel.py"):
        (tmp_path / name).touch()
    assert network_run.cached_files() == 2


def test_a_run_goes_on_inside_a_measurement(tmp_path: Path) -> None:
    """Each provider's record is written when it ends; the first provider is measured again at the end."""
    asked: list[str] = []

    def run(provider: NetworkProvider, one: Measurement, part: str) -> Figures:
        if provider.name == "timm eager" and interrupted:
            raise KeyboardInterrupt
        asked.append(provider.name + ", again" * (part == "speed"))
        return figures()

    names = ["ours frozen", "timm eager", "ours eager"]
    interrupted = True
    for _ in range(3):  # which is not the provider's fault
        with pytest.raises(KeyboardInterrupt):
            run_one(results(tmp_path), run, providers=names)
    assert asked == ["ours frozen"]
    interrupted = False
    file = results(tmp_path, LATER)
    run_one(file, run, providers=names)
    assert asked == ["ours frozen", "timm eager", "ours eager", "ours frozen, again"]
    assert is_complete(ONE, file, names)
    assert run_one(results(tmp_path), run, providers=names) == []
    assert len(asked) == 4


def test_what_is_measured_after_the_first_was_measured_again_has_it_measured_anew(tmp_path: Path) -> None:
    asked: list[str] = []

    def run(provider: NetworkProvider, one: Measurement, part: str) -> Figures:
        asked.append(provider.name + ", again" * (part == "speed"))
        return figures(2.0 + len(asked))

    run_one(results(tmp_path), run, providers=["ours frozen"])
    file = results(tmp_path, LATER)
    both = ["ours frozen", "ours eager"]
    assert not is_complete(ONE, file, both)
    records = run_one(file, run, providers=both)
    assert asked == ["ours frozen", "ours frozen, again", "ours eager", "ours frozen, again"]
    (ms,) = [record for record in records if (record.provider, record.metric) == ("ours frozen", "ms")]
    assert (ms.details["first"], ms.details["again"], ms.p50) == (3.0, 6.0, 6.0)


def test_what_torch_compiles_is_compiled_side_by_side_before_any_of_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks.os, "cpu_count", lambda: 8)
    together = threading.Barrier(2, timeout=30)
    asked: list[tuple[str, str]] = []

    def run(provider: NetworkProvider, one: Measurement, part: str) -> Figures:
        asked.append((provider.name, part))
        if part != "compile":
            return figures()
        if provider.name == "timm torch.compile max-autotune":
            together.wait()
            raise FailedError("it has no memory left")
        together.wait()
        found = Figures()
        found.put("compile s", 99.0)
        return found

    first, second = "timm torch.compile", "timm torch.compile max-autotune"
    records = run_one(results(tmp_path), run, providers=[first, second, "ours frozen", "timm eager"])
    assert asked[0] == ("ours frozen", "all")
    assert {name for name, part in asked[1:3] if part == "compile"} == {first, second}
    assert [part for _, part in asked[3:]] == ["all", "all", "all", "speed"]
    seconds = {record.provider: record.p50 for record in records if record.metric == "compile s"}
    assert seconds[first] == 99.0, "a compiled network's code is in the cache when it is measured"
    (ms,) = [record for record in records if (record.provider, record.metric) == (first, "ms")]
    assert ms.details["compiled beside others"] == 1


def test_nothing_is_started_when_the_time_is_over(tmp_path: Path) -> None:
    def run(provider: NetworkProvider, one: Measurement, part: str) -> Figures:
        file.deadline = 0.0
        return figures()

    file = results(tmp_path)
    records = run_one(file, run)
    assert {record.provider for record in records} == {"ours frozen"}, "the deadline does not stop a running provider"
    assert not is_complete(ONE, file)
    other = ONE._replace(batch=3)
    assert len(list(measure_networks([ONE, other], file, CPU, run=run))) == 1, "nor is another measurement begun"
    assert {record.shape[0] for record in read_records(file.path)} == {ONE.batch}


def test_records_hold_for_their_setup(tmp_path: Path) -> None:
    names = ["ours eager"]
    run_one(results(tmp_path), lambda *_: figures(), providers=names)
    assert is_complete(ONE, results(tmp_path), names)
    assert not is_complete(ONE, results(tmp_path))
    assert is_complete(ONE, results(tmp_path, LATER), names)
    for field in ("gpu", "driver", "torch", "triton", "timm", "sources"):
        assert not is_complete(ONE, results(tmp_path, replace(HERE, **{field: "other"})), names), field


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    file = results(tmp_path)
    run_one(file, lambda *_: figures(), providers=["ours eager"])
    whole = file.path.read_text()
    file.path.write_text(whole[:-20])
    assert not is_complete(ONE, results(tmp_path), ["ours eager"])
    run_one(results(tmp_path), lambda *_: figures(), providers=["ours eager"])
    assert is_complete(ONE, results(tmp_path), ["ours eager"])


def test_a_full_disk_loses_no_record(tmp_path: Path) -> None:
    file = results(tmp_path)
    run_one(file, lambda *_: figures(), providers=["ours eager"])
    whole = file.path.read_bytes()
    for ending in (b"", b'{"op": "of a process that was kil'):
        file.path.write_bytes(whole + ending)
        with full_disk(len(whole) + 99), pytest.raises(OSError, match=f"^{file.path} cannot be written: "):
            run_one(results(tmp_path), lambda *_: figures(), providers=["ours frozen"])
        assert file.path.read_bytes() == whole


# --- table, exit status -----------------------------------------------------------------------------------------------


def record(provider: str, metric: str, p50: float, **more: Any) -> Record:
    return Record(ONE.model, provider, "forward", ONE.dtype, ONE.shape, metric, p50, HERE, **more)


def test_table_names_the_baseline_and_shows_losses() -> None:
    speeds = {"timm eager": (500.0, 2.0), "timm torch.compile": (1000.0, 4.0), "ours frozen": (800.0, 1.0)}
    records = []
    for name, (rate, ms) in speeds.items():
        metrics = {"ms": ms, "p99 ms": 9.0, "img/s": rate, "max error": 1e-3, "top-1 agreement": 0.5}
        records += [record(name, metric, value) for metric, value in metrics.items()]
    records.append(record("ours triton", "not run", math.nan, why="no GPU"))
    title, *lines, doubts = as_text(*compare(records)).splitlines()
    assert title == "efficientformer_l1, 2x3x224x224, float32"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}
    assert {name: row["x baseline"] for name, row in rows.items()} == {
        "timm eager": "0.50x (slower)",
        "timm torch.compile (the baseline)": "1.00x",
        "ours frozen": "0.80x (slower)",
        "ours triton": "",
    }
    assert (rows["ours triton"]["img/s"], rows["ours triton"]["remarks"]) == ("not run", "no GPU")
    assert rows["ours frozen"]["max error"] == "1.0e-3"
    assert "peak MiB" not in cells[0], "an empty column"
    assert "a baseline may be faster yet: timm torch.compile max-autotune, timm" in doubts


def test_missing_packages_are_named_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(networks, "in_process", lambda *_, device: figures())
    call = ["bench", "--device", "cpu", "--batch-size", "2", "--dtype", "float32", "--output", str(tmp_path)]
    assert main(call) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "not installed: timm (its networks are not run), matplotlib (the report has no pictures)"
    assert any(re.search(r"timm eager .*not run .*timm is not installed", line) for line in lines)


@pytest.mark.parametrize(("minutes", "status"), [([], 1), (["--minutes", "1e-9"], 75)])
def test_exit_status(
    minutes: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(*_: Any, device: Any) -> Figures:
        raise FailedError("no luck")

    monkeypatch.setattr(networks, "in_process", fail)
    call = ["bench", "--device", "cpu", "--batch-size", "1", "--dtype", "float32", "--output", str(tmp_path)]
    assert main([*call, "--provider", "ours eager", *minutes]) == status
    captured = capsys.readouterr()
    assert ("1 of 1 measurements remain" in captured.out) == (status == 75)
    assert ("ours eager: no luck" in captured.err) == (status == 1)
