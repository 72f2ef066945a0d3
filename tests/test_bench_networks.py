"""Measuring networks: order, providers, details of a run, resumption, and a narrow network from end to end."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from effformer.bench.measure import network_providers, network_run, networks, profile, resume
from effformer.bench.measure.network_providers import (
    BY_NAME,
    Measurement,
    NetworkProvider,
    build,
    draw_images,
    draw_weights,
    providers_of,
)
from effformer.bench.measure.network_run import Figures
from effformer.bench.measure.networks import in_order, is_complete, measure_networks
from effformer.bench.measure.process import in_process
from effformer.bench.measure.records import Machine, Record, read_records
from effformer.bench.measure.resume import FailedError, ResultsFile
from effformer.bench.measure.timm_model import fold_batch_norm
from effformer.bench.report.comparison import compare
from effformer.bench.report.tables import as_text
from torch import nn

from effformer import create_model
from effformer.cli import main
from effformer.testing import randomise

CPU = torch.device("cpu")
ONE = Measurement("efficientformer_l1", 2, "float32", 224, 224)
HERE = Machine("cpu: none", "none", torch.__version__, "3", "1", "code", "abc", "2026-01-01T00:00:00+00:00")
LATER = replace(HERE, date="2026-01-02T00:00:00+00:00", commit="of results alone")
EAGER = [name for name in BY_NAME if name.startswith("timm eager")] + ["ours eager", "ours frozen"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small(timm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow networks in place of the published ones, and few calls of each."""
    sizes = {"depths": (1, 1, 1, 2), "num_vit": 1, "num_classes": 10}
    monkeypatch.setattr(
        network_providers,
        "create_model",
        lambda name, backend: create_model(name, widths=(8, 12, 16, 24), backend=backend, **sizes),
    )
    narrow = SimpleNamespace(create_model=partial(timm.create_model, embed_dims=(8, 12, 16, 24), **sizes))
    monkeypatch.setattr(network_providers, "import_timm", lambda: narrow)
    for name, value in {"LEAST_SECONDS": 0, "LEAST_CALLS": 2, "ROUNDS": 2, "ROUND_SECONDS": 0}.items():
        monkeypatch.setattr(network_run, name, value)
    monkeypatch.setitem(network_run.COMPARED, "cpu", 4)
    for name, value in {"ceilings.CPU_SIDE": 64, "ceilings.CPU_BYTES": 2**16, "timing.CPU_CACHE": 2**16}.items():
        monkeypatch.setattr(f"effformer.bench.measure.{name}", value)


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


def run_one(file: ResultsFile, run: networks.Run, one: Measurement = ONE, **options: Any) -> list[Record]:
    """The records of one measurement, as far as it came."""
    found = list(measure_networks([one], file, CPU, run=run, **options))
    return found[0] if found else []


# --- order, providers ------------------------------------------------------------------------------------------------------


def test_the_most_telling_comes_first() -> None:
    models = ["efficientformer_l7", "efficientformer_l1"]
    found = in_order(models, [1, 64, 8, 256], ["float16", "bfloat16"], [(224, 224), (512, 384)])
    assert [(one.model[-2:], one.batch) for one in found[:8]] == [
        ("l1", 256), ("l1", 1), ("l7", 256), ("l7", 1), ("l1", 64), ("l7", 64), ("l1", 8), ("l7", 8),
    ]  # fmt: skip
    assert [(one.dtype, one.height, one.width) for one in found[::8]] == [
        ("bfloat16", 224, 224), ("float16", 224, 224), ("bfloat16", 512, 384), ("float16", 512, 384),
    ]  # fmt: skip
    assert len(found) == len(set(found)) == 32


def test_where_timm_cannot_run_our_network_is_compiled_in_its_place() -> None:
    wide = ONE._replace(width=384)
    for provider in providers_of(wide):
        reason = provider.why_not(wide, CPU)
        on_gpu_alone = provider.backend == "triton" or provider.captured
        assert (reason is not None) == (provider.whose == "timm" or on_gpu_alone), provider.name
    assert {p.name for p in providers_of(wide)} - {p.name for p in providers_of(ONE)} == {
        p.name for p in network_providers.STAND_INS
    }
    assert "224x224" in str(BY_NAME["timm eager"].why_not(wide, CPU))


def test_without_timm_its_providers_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert BY_NAME["timm eager"].why_not(ONE, CPU) == "timm is not installed (pip install 'effformer[timm]')"


def test_a_captured_function_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a graph that computes again."""
    calls = []

    class Replay:
        def __init__(self, forward: Callable[[], torch.Tensor]) -> None:
            self.forward, self.result = forward, forward()

        def replay(self) -> None:
            self.result.copy_(self.forward())

    def capture(forward: Callable[[], torch.Tensor], pool: Any) -> Any:
        calls.append(forward)
        graph = Replay(forward)
        return pool, graph, graph.result

    monkeypatch.setattr(network_providers, "capture_graph", capture)
    captured = network_providers.Captured(lambda x: 2 * x)
    x, y = torch.randn(2, 3)
    first, second = captured(x), captured(y)
    assert torch.equal(first, 2 * x)
    assert torch.equal(second, 2 * y)
    assert captured.held_bytes == 2 * 3 * 4
    assert len(calls) == 1
    provider = BY_NAME["timm torch.compile max-autotune, captured"]
    assert provider.wants_graph
    assert provider.options is not None
    assert provider.options["triton.cudagraphs"] is False, "one graph within another"


@torch.no_grad()
def test_folded_is_the_same_in_float64(timm: Any, small: None) -> None:
    model = randomise(network_providers.import_timm().create_model("efficientformer_l1")).double().eval()
    x = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    want = model(x)
    got = fold_batch_norm(model)(x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert (got - want).abs().max() <= 1e-12 * want.abs().max()
    with pytest.raises(ValueError, match=r"without a convolution right before it, 0\.1"):
        fold_batch_norm(nn.Sequential(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))).eval())


def test_weights_are_those_that_the_dtype_holds(small: None) -> None:
    drawn, rounded = draw_weights("efficientformer_l1"), draw_weights("efficientformer_l1", torch.bfloat16)
    for key, value in rounded.items():
        assert torch.equal(value, value.bfloat16().to(value.dtype)), key
    assert any(not torch.equal(drawn[key], value) for key, value in rounded.items())
    assert torch.equal(draw_images(ONE, 4)[:2], draw_images(ONE, 2))


# --- details -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", EAGER)
def test_options_acted(small: None, name: str) -> None:
    provider = BY_NAME[name]
    network = build(provider, ONE, CPU)
    images = draw_images(ONE, 2)
    images = images.contiguous(memory_format=torch.channels_last) if provider.channels_last else images
    found = profile.details_of(provider, network, images, profile.Freezing())
    assert profile.doubts(provider, found, CPU) == []
    assert found["kernels"] > 10
    assert not found["graph"]
    if provider.whose == "timm":
        other = replace(provider, folded=not provider.folded, channels_last=not provider.channels_last)
        wrong = profile.doubts(other, found, CPU)
        expected = "there is no BatchNorm" if provider.folded else "BatchNorm is left"
        assert wrong == [expected, "maps are not in the layout asked for"]
        assert (found["batch_norm"] > 0) != provider.folded


def test_gpu_profile_counts_kernels_alone() -> None:
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(name: str, device: Any = cuda, *, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation)

    events = [
        event("cudaGraphLaunch", cpu),
        event("aten::batch_norm", cpu),
        event("mlp_kernel"),
        event("cudnn::bn_fw_inf_1C11_kernel_NCHW"),
        event("nchwToNhwcKernel"),
        event("Memcpy DtoD (Device -> Device)"),
        event("Torch-Compiled Region: 0/0", annotation=True),
    ]
    found = profile.kernels_of(events, on_gpu=True)
    assert found == ["mlp_kernel", "cudnn::bn_fw_inf_1C11_kernel_NCHW", "nchwToNhwcKernel"]
    assert (profile.count(profile.BATCH_NORM, found), profile.count(profile.LAYOUT, found)) == (1, 1)
    assert profile.own_kernels() >= {"mlp_kernel", "linear_kernel", "pool_mixer_kernel"}


def test_doubts_on_a_gpu() -> None:
    found = {
        "batch_norm": 0,
        "batch_norm_modules": 0,
        "channels_last": True,
        "triton": 0,
        "graph": False,
        "freezing": False,
    }
    best, ours = BY_NAME["timm torch.compile max-autotune"], BY_NAME["ours frozen"]
    gpu = torch.device("cuda")
    assert profile.doubts(best, found, gpu) == ["no CUDA graph was replayed", "weights were not frozen"]
    assert profile.doubts(ours, found, gpu) == ["no CUDA graph was replayed", "none of our kernels ran"]
    assert profile.doubts(ours, found | {"graph": True, "triton": 30}, gpu) == []


def test_what_inductor_froze_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import freezing

    class Net(nn.Module):
        def __init__(self, layout: torch.memory_format) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3).contiguous(memory_format=layout))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.ops.aten.convolution(x, self.weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
            return torch.ops.aten._native_batch_norm_legit_no_training(x, None, None, x, x, 0.1, 1e-5)[0]

    for layout, indices in ((torch.channels_last, [7]), (torch.contiguous_format, [0, 7])):
        graph = torch.fx.symbolic_trace(Net(layout))
        monkeypatch.setattr(freezing, "freeze", lambda *_, graph=graph, indices=indices: (graph, indices))
        with profile.watched_freezing() as seen:
            freezing.freeze(None, None, None)
        assert (seen.inputs, seen.batch_norms) == (len(indices), 1)
        assert seen.channels_last == (layout == torch.channels_last)


def test_dynamo_knows_that_weights_are_frozen() -> None:
    from torch._dynamo.utils import is_parameter_freezing

    with torch.no_grad(), BY_NAME["timm torch.compile max-autotune"].compiling():
        assert is_parameter_freezing()
        assert torch._inductor.config.triton.cudagraphs
    with torch.no_grad(), BY_NAME["timm torch.compile"].compiling():
        assert not is_parameter_freezing()


def test_private_pools_count_what_no_tensor_has() -> None:
    segments = [
        {"device": 0, "total_size": 100, "allocated_size": 30, "segment_pool_id": (0, 0)},
        {"device": 0, "total_size": 50, "allocated_size": 20, "segment_pool_id": (0, 1)},
        {"device": 1, "total_size": 900, "allocated_size": 0, "segment_pool_id": (0, 1)},
    ]
    assert network_run.pool_bytes(segments, 0) == 30


# --- what a run leaves behind ---------------------------------------------------------------------------------------------


def test_every_provider_is_recorded_and_the_first_measured_again(tmp_path: Path) -> None:
    asked = []

    def run(provider: NetworkProvider, one: Measurement, speed_alone: bool) -> Figures:
        asked.append((provider.name, speed_alone))
        return figures(2.4 if speed_alone else 2.0)

    file = results(tmp_path)
    records = run_one(file, run)
    assert [asked[0], asked[-1]] == [("ours frozen", False), ("ours frozen", True)]
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
    def run(provider: NetworkProvider, one: Measurement, speed_alone: bool) -> Figures:
        found = figures(last if speed_alone else 2.0)
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
    def run(provider: NetworkProvider, one: Measurement, speed_alone: bool) -> Figures:
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

    def run(provider: NetworkProvider, one: Measurement, speed_alone: bool) -> Figures:
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

    def run(provider: NetworkProvider, one: Measurement, speed_alone: bool) -> Figures:
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

    def run(provider: NetworkProvider, one: Measurement, speed_alone: bool) -> Figures:
        if provider.name == "timm eager" and interrupted:
            raise KeyboardInterrupt
        asked.append(provider.name + ", again" * speed_alone)
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

    def run(provider: NetworkProvider, one: Measurement, speed_alone: bool) -> Figures:
        asked.append(provider.name + ", again" * speed_alone)
        return figures(2.0 + len(asked))

    run_one(results(tmp_path), run, providers=["ours frozen"])
    file = results(tmp_path, LATER)
    both = ["ours frozen", "ours eager"]
    assert not is_complete(ONE, file, both)
    records = run_one(file, run, providers=both)
    assert asked == ["ours frozen", "ours frozen, again", "ours eager", "ours frozen, again"]
    (ms,) = [record for record in records if (record.provider, record.metric) == ("ours frozen", "ms")]
    assert (ms.details["first"], ms.details["again"], ms.p50) == (3.0, 6.0, 6.0)


def test_nothing_is_started_when_the_time_is_over(tmp_path: Path) -> None:
    def run(provider: NetworkProvider, one: Measurement, speed_alone: bool) -> Figures:
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


def test_a_process_is_ended_with_all_that_it_started(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/started\nsleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        in_process(BY_NAME["ours eager"], ONE, False, device=CPU, seconds=1.0)
    assert time.monotonic() - begin < 30
    stat = Path("/proc", (tmp_path / "started").read_text().strip(), "stat")
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() - begin < 30
        time.sleep(0.1)


def test_a_process_tells_why_it_failed(cache: Path) -> None:
    with pytest.raises(FailedError, match=r"^ValueError: .*no such model"):
        in_process(BY_NAME["ours eager"], ONE._replace(model="no such model"), False, device=CPU)


# --- the command ----------------------------------------------------------------------------------------------------------


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


def test_command(
    small: None, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(provider: NetworkProvider, one: Measurement, speed_alone: bool, *, device: Any) -> Figures:
        found = network_run.measure_provider(provider, one, device, speed_alone=speed_alone)
        return Figures(**json.loads(json.dumps(found.__dict__)))

    monkeypatch.setattr(networks, "in_process", here)
    call = [
        "bench",
        "--device",
        "cpu",
        "--batch-size",
        "2",
        "--dtype",
        "float32",
        "--output",
        str(tmp_path),
        "--provider",
    ]
    names = ["timm eager", "timm eager, channels_last + BN folded", "ours eager", "ours frozen"]
    assert main([*call, *names]) == 0
    out = capsys.readouterr().out
    assert "CPU run: it says nothing about a GPU" in out
    assert all(f"\n| {name} " in out for name in names)
    assert re.search(r"timm eager.* \(the baseline\)", out)
    found = [record for record in read_records(tmp_path / "cpu" / "networks.jsonl") if record.metric != "begun"]
    shares = {r.roofline is None for r in found if r.provider == "ours frozen" and r.metric == "ms"}
    assert shares == {False}
    assert {found_one.provider for found_one in found} == {*names}
    for name in names:
        values = {r.metric: r.p50 for r in found if r.provider == name}
        assert set(values) == {
            "ms", "p99 ms", "img/s", "first call s", "compile s", "max error", "mean error", "top-1 agreement",
        }  # fmt: skip
        assert 0 < values["mean error"] < values["max error"] < 1e-5
        assert values["top-1 agreement"] == 1.0

    assert main([*call, *names]) == 0
    assert "1 of 1 measurements are complete already" in capsys.readouterr().out
    assert main([*call, *names, "--list"]) == 0
    assert "complete  efficientformer_l1, 2x3x224x224, float32: 4 providers" in capsys.readouterr().out
    assert main([*call, *names, "--json"]) == 0
    captured = capsys.readouterr()
    assert {json.loads(line)["provider"] for line in captured.out.splitlines()} == {*names}
    assert "1 of 1 measurements are complete already" in captured.err


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


def test_wrong_provider(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "run", "--device", "cpu", "--provider", "timm"]) == 1
    assert "--provider: got 'timm', allowed are 'ours frozen', 'timm torch.compile" in capsys.readouterr().err


def test_bare_bench_is_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found: list[Callable[..., Any]] = []
    monkeypatch.setattr("effformer.commands.bench.main", lambda arguments: found.append(arguments.minutes) or 0)
    assert main(["bench"]) == main(["bench", "--minutes", "2"]) == main(["bench", "run"]) == 0
    assert found == [None, 2.0, None]
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--minutes", "2", "tune"])
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "--help"])
    assert {"run", "tune"} <= set(capsys.readouterr().out.split())
