"""The ladder: its cells, what a run leaves behind, its evidence, and a narrow network from one end to the other."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from effformer.bench.measure import network_providers as ladder
from effformer.bench.measure import network_run as rung
from effformer.bench.measure import networks as backbone
from effformer.bench.measure import profile as evidence
from effformer.bench.measure.network_providers import BY_NAME, Cell, build, draw_images, draw_weights, rungs
from effformer.bench.measure.network_run import Figures
from effformer.bench.measure.networks import complete, in_order, run_cell, run_ladder
from effformer.bench.measure.process import FailedError, in_process
from effformer.bench.measure.records import Machine, Record, read_records
from effformer.bench.measure.resume import Attempts
from effformer.bench.measure.timm_model import fold_batch_norm
from torch import nn

from effformer import create_model
from effformer.cli import main
from effformer.commands.bench import table
from effformer.testing import randomise

CPU = torch.device("cpu")
CELL = Cell("efficientformer_l1", 2, "float32", 224, 224)
HERE = Machine("cpu: none", "none", torch.__version__, "3", "abc", "2026-01-01T00:00:00+00:00")
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
        ladder, "_ours", lambda name, backend: create_model(name, widths=(8, 12, 16, 24), backend=backend, **sizes)
    )
    monkeypatch.setattr(ladder, "_timm", lambda name: timm.create_model(name, embed_dims=(8, 12, 16, 24), **sizes))
    for name, value in {"LEAST_SECONDS": 0, "MOST_CALLS": 3, "LEAST_CALLS": 2, "ROUNDS": 2, "ROUND_SECONDS": 0}.items():
        monkeypatch.setattr(rung, name, value)
    monkeypatch.setitem(rung.COMPARED, "cpu", 4)


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


def run_one(cell: Cell, run: backbone.Run, cache: Path, seconds: float = 1e3, **options: Any) -> backbone.Outcome:
    return run_cell(
        cell,
        HERE,
        CPU,
        run,
        time.monotonic() + seconds,
        stopped=Attempts(cache / "stopped.jsonl", HERE, "code"),
        **options,
    )


# --- cells and rungs ------------------------------------------------------------------------------------------------------


def test_most_telling_cells_come_first() -> None:
    models = ["efficientformer_l7", "efficientformer_l1"]
    found = in_order(models, [1, 64, 8, 256], ["float16", "bfloat16"], [(224, 224), (512, 384)])
    assert [(cell.model[-2:], cell.batch) for cell in found[:8]] == [
        ("l1", 256), ("l1", 1), ("l7", 256), ("l7", 1), ("l1", 64), ("l7", 64), ("l1", 8), ("l7", 8),
    ]  # fmt: skip
    assert [(cell.dtype, cell.height, cell.width) for cell in found[::8]] == [
        ("bfloat16", 224, 224), ("float16", 224, 224), ("bfloat16", 512, 384), ("float16", 512, 384),
    ]  # fmt: skip
    assert len(found) == len(set(found)) == 32


def test_where_timm_cannot_run_our_network_is_compiled_in_its_place() -> None:
    wide = CELL._replace(width=384)
    for provider in rungs(wide):
        reason = provider.unavailable(wide, CPU)
        on_gpu_alone = provider.backend == "triton" or provider.captured
        assert (reason is not None) == (provider.whose == "timm" or on_gpu_alone), provider.name
    assert {p.name for p in rungs(wide)} - {p.name for p in rungs(CELL)} == {p.name for p in ladder.STAND_INS}
    assert "224x224" in str(BY_NAME["timm eager"].unavailable(wide, CPU))


def test_without_timm_its_rungs_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert BY_NAME["timm eager"].unavailable(CELL, CPU) == "timm is not installed (pip install effformer[timm])"


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

    monkeypatch.setattr(ladder, "capture_graph", capture)
    captured = ladder.Captured(lambda x: 2 * x)
    x, y = torch.randn(2, 3)
    first, second = captured(x), captured(y)
    assert torch.equal(first, 2 * x)
    assert torch.equal(second, 2 * y)
    assert captured.held_bytes == ladder.Built(captured).held_bytes == 2 * 3 * 4
    assert len(calls) == 1
    provider = BY_NAME["timm torch.compile max-autotune, captured"]
    assert provider.wants_graph
    assert provider.options is not None
    assert provider.options["triton.cudagraphs"] is False, "one graph within another"


@torch.no_grad()
def test_folded_is_the_same_in_float64(timm: Any, small: None) -> None:
    model = randomise(ladder._timm("efficientformer_l1")).double().eval()
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
    assert torch.equal(draw_images(CELL, 4)[:2], draw_images(CELL, 2))


# --- evidence -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", EAGER)
def test_options_acted(small: None, name: str) -> None:
    provider = BY_NAME[name]
    built = build(provider, CELL, CPU)
    images = draw_images(CELL, 2)
    images = images.contiguous(memory_format=torch.channels_last) if provider.channels_last else images
    found = evidence.evidence(provider, built, images, evidence.Frozen())
    assert evidence.doubts(provider, found, CPU) == []
    assert found["kernels"] > 10
    assert not found["graph"]
    if built.model is not None and provider.whose == "timm":
        other = replace(provider, folded=not provider.folded, channels_last=not provider.channels_last)
        wrong = evidence.doubts(other, found, CPU)
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
    found = evidence.read_profile(events, on_gpu=True)
    assert (len(found.kernels), found.graphs) == (3, 1)
    assert (found.count(evidence.BATCH_NORM), found.count(evidence.LAYOUT)) == (1, 1)
    assert evidence.own_kernels() >= {"mlp_kernel", "linear_kernel", "pool_mixer_kernel"}


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
    assert evidence.doubts(best, found, gpu) == ["no CUDA graph was replayed", "weights were not frozen"]
    assert evidence.doubts(ours, found, gpu) == ["no CUDA graph was replayed", "none of our kernels ran"]
    assert evidence.doubts(ours, found | {"graph": True, "triton": 30}, gpu) == []


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
        with evidence.watched_freezing() as seen:
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
    assert rung.pool_bytes(segments, 0) == 30


def test_quantiles() -> None:
    assert [rung.quantile([4.0, 1.0, 2.0, 3.0, 5.0], share) for share in (0, 0.2, 0.5, 0.99)] == pytest.approx(
        [1.0, 1.8, 3.0, 4.96]
    )


# --- what a run leaves behind ---------------------------------------------------------------------------------------------


def test_a_cell_holds_all_rungs_and_the_drift(cache: Path) -> None:
    asked = []

    def run(provider: ladder.Provider, cell: Cell, speed_alone: bool, seconds: float) -> Figures:
        asked.append((provider.name, speed_alone))
        return figures(2.4 if speed_alone else 2.0)

    outcome = run_one(CELL, run, cache)
    assert [asked[0], asked[-1]] == [("ours frozen", False), ("ours frozen", True)]
    assert [name for name, _ in asked[1:4]] == [
        "timm torch.compile max-autotune", "timm torch.compile max-autotune-pointwise",
        "timm torch.compile max-autotune-pointwise + conv_1x1_as_mm",
    ]  # fmt: skip
    assert outcome.whole
    assert {record.provider for record in outcome.records} == {provider.name for provider in rungs(CELL)}
    assert {record.machine.date for record in outcome.records} == {HERE.date}
    skipped = [record for record in outcome.records if record.metric == "not run"]
    assert [record.provider for record in skipped] == ["timm torch.compile max-autotune, captured", "ours triton"]
    assert all(math.isnan(record.p50) for record in skipped)


@pytest.mark.parametrize(("last", "slower"), [(2.5, 2.5), (1.6, 2.0)])
def test_the_slower_of_first_and_last_counts(last: float, slower: float, cache: Path) -> None:
    def run(provider: ladder.Provider, cell: Cell, speed_alone: bool, seconds: float) -> Figures:
        found = figures(last if speed_alone else 2.0)
        found.evidence["floor ms"] = 1.0
        return found

    records = {r.metric: r for r in run_one(CELL, run, cache).records if r.provider == "ours frozen"}
    ms, rate = records["ms"], records["img/s"]
    assert (ms.p50, records["p99 ms"].p50, rate.p50) == (slower, 2 * slower, 2e3 / slower)
    assert ms.roofline == rate.roofline == 1 / slower
    assert ms.evidence["drift"] == pytest.approx(last / 2 - 1)
    assert (ms.evidence["first"], ms.evidence["again"]) == (2.0, last)
    assert ms.why == f"the machine drifted: {last / 2 - 1:+.0%} at the end of the cell"


def test_floor_shares() -> None:
    found = figures()
    assert backbone.floor_share(found, CELL, "ms", 2.0) is None
    found.evidence["floor ms"] = 0.5
    shares = [backbone.floor_share(found, CELL, metric, p50) for metric, p50 in (("ms", 2.0), ("img/s", 1e3))]
    assert shares == [0.25, 0.25]  # two images in 2 ms, and in 2 ms


def test_a_failing_rung_takes_no_other_with_it(cache: Path) -> None:
    def run(provider: ladder.Provider, cell: Cell, speed_alone: bool, seconds: float) -> Figures:
        if provider.name in ("ours eager", "timm eager"):
            raise FailedError("OutOfMemoryError: 3 MiB")
        return figures()

    outcome = run_one(CELL, run, cache)
    assert outcome.failed == ("timm eager", "ours eager")
    reasons = {record.provider: record.why for record in outcome.records if record.metric == "not run"}
    assert reasons["timm eager"] == reasons["ours eager"] == "OutOfMemoryError: 3 MiB"
    assert len(reasons) == 4


def test_a_rung_is_stopped_twice_at_most(cache: Path) -> None:
    def run(provider: ladder.Provider, cell: Cell, speed_alone: bool, seconds: float) -> Figures:
        if provider.name == "timm torch.compile":
            raise TimeoutError
        return figures()

    assert not run_one(CELL, run, cache, seconds=100).whole  # the time was over, which says nothing of the rung
    assert not run_one(CELL, run, cache).whole
    outcome = run_one(CELL, run, cache)
    assert outcome.whole
    reasons = {record.provider: record.why for record in outcome.records if record.metric == "not run"}
    assert reasons["timm torch.compile"] == "it took longer than 400 s, twice"
    other = CELL._replace(batch=3)
    assert not run_one(other, run, cache, seconds=100, alone=True).whole
    assert run_one(other, run, cache, seconds=100, alone=True).whole


def test_attempts_outlive_the_process_and_count_for_their_machine_and_code(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path / "folder" / "attempts", HERE, "code")
    attempts.remove("rung", CELL)  # another process has done so
    for _ in range(3):
        attempts.add("rung", CELL)
    attempts.add("rung", CELL._replace(batch=3))
    attempts.remove("rung", CELL)
    later = replace(HERE, date="later", commit="of results alone")
    assert Attempts(attempts.path, later, "code").count("rung", CELL) == 2
    assert Attempts(attempts.path, replace(HERE, torch="3"), "code").count("rung", CELL) == 0
    assert Attempts(attempts.path, HERE, "other").count("rung", CELL) == 0


def test_files_that_inductor_keeps_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    assert rung.cached_files() == 0
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "ab").mkdir()
    for name in ("kernel.py", "ab/kernel.py"):
        (tmp_path / name).touch()
    assert rung.cached_files() == 2


def test_what_there_is_when_the_time_is_over_is_kept(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "backbone.jsonl"

    def run(provider: ladder.Provider, cell: Cell, speed_alone: bool, seconds: float) -> Figures:
        if provider.name in slow or speed_alone in slow:
            raise TimeoutError
        return figures()

    def go() -> list[backbone.Outcome]:
        return list(run_ladder([CELL], path, lambda: HERE, CPU, 1e3, run=run))

    slow: tuple[object, ...] = ("timm torch.compile max-autotune",)
    assert go() == [], "ours alone says nothing"
    slow = ("timm torch.compile max-autotune-pointwise",)
    (outcome,) = go()
    assert not outcome.whole
    providers = {record.provider for record in read_records(path) if record.evidence.get("cut off")}
    assert providers == {"ours frozen", "timm torch.compile max-autotune"}
    slow = (True,)  # the last rung of all
    (outcome,) = go()
    assert not outcome.whole
    assert complete(path, HERE) == set()
    (outcome,) = go()
    assert outcome.whole
    assert complete(path, HERE) == {CELL}


def test_an_interrupted_cell_is_begun_again_and_a_whole_one_is_not(tmp_path: Path, cache: Path) -> None:
    path, other = tmp_path / "backbone.jsonl", CELL._replace(batch=3)
    asked: list[tuple[int, str]] = []

    def run(provider: ladder.Provider, cell: Cell, speed_alone: bool, seconds: float) -> Figures:
        asked.append((cell.batch, provider.name))
        if cell == other and interrupted and provider.name == "timm eager":
            raise KeyboardInterrupt
        return figures()

    def go() -> None:
        todo = [cell for cell in (CELL, other) if cell not in complete(path, HERE)]
        for _ in run_ladder(todo, path, lambda: HERE, CPU, 1e3, run=run):
            pass

    interrupted = True
    with pytest.raises(KeyboardInterrupt):
        go()
    assert complete(path, HERE) == {CELL}
    assert {record.shape[0] for record in read_records(path)} == {CELL.batch}
    interrupted = False
    asked.clear()
    go()
    assert {batch for batch, _ in asked} == {3}
    assert complete(path, HERE) == {CELL, other}


def test_what_is_complete(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "backbone.jsonl"
    for _ in run_ladder([CELL], path, lambda: HERE, CPU, 1e3, run=lambda *_: figures(), providers=["ours eager"]):
        pass
    assert complete(path, HERE, ["ours eager"]) == {CELL}
    assert complete(path, HERE) == set()
    assert complete(path, replace(HERE, date="later", commit="other"), ["ours eager"]) == {CELL}
    assert complete(path, replace(HERE, torch="3"), ["ours eager"]) == set()
    monkeypatch.setattr(backbone, "known", lambda: {"sources": "changed"})
    assert complete(path, HERE, ["ours eager"]) == set()


def test_a_process_is_ended_with_all_that_it_started(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/started\nsleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        in_process(BY_NAME["ours eager"], CELL, False, 1.0, device=CPU)
    assert time.monotonic() - begin < 30
    stat = Path("/proc", (tmp_path / "started").read_text().strip(), "stat")
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() - begin < 30
        time.sleep(0.1)


def test_a_process_tells_why_it_failed(cache: Path) -> None:
    with pytest.raises(FailedError, match=r"^ValueError: .*no such model"):
        in_process(BY_NAME["ours eager"], CELL._replace(model="no such model"), False, 60, device=CPU)


# --- the command ----------------------------------------------------------------------------------------------------------


def record(provider: str, metric: str, p50: float, **more: Any) -> Record:
    return Record(CELL.model, provider, "forward", CELL.dtype, CELL.shape, metric, p50, HERE, **more)


def test_table_names_the_baseline_and_shows_losses() -> None:
    speeds = {"timm eager": (500.0, 2.0), "timm torch.compile": (1000.0, 4.0), "ours frozen": (800.0, 1.0)}
    records = []
    for name, (rate, ms) in speeds.items():
        metrics = {"ms": ms, "p99 ms": 9.0, "img/s": rate, "max error": 1e-3, "top-1 agreement": 0.5}
        records += [record(name, metric, value) for metric, value in metrics.items()]
    records.append(record("ours triton", "not run", math.nan, why="no GPU"))
    lines = table(records)
    gains = {line.split("  ")[1]: line.split()[-2:] for line in lines if re.search(r"\d$", line) and "%" in line}
    assert gains == {
        "timm eager": ["0.50", "1.00"],
        "timm torch.compile": ["1.00", "0.50"],
        "ours frozen": ["0.80", "2.00"],
    }
    assert "ours triton" in lines[5]
    assert "not run: no GPU" in lines[5]
    assert lines[6].strip() == "baseline: timm torch.compile (img/s), timm eager (ms)"
    assert "a rival may be faster yet: timm torch.compile max-autotune, timm" in lines[7]


def test_command(
    small: None, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(provider: ladder.Provider, cell: Cell, speed_alone: bool, seconds: float, *, device: Any) -> Figures:
        found = rung.measure_rung(provider, cell, device, speed_alone=speed_alone)
        return Figures(**json.loads(json.dumps(found.__dict__)))

    monkeypatch.setattr(backbone, "in_process", here)
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
    assert "CPU run: says nothing about a GPU" in out
    assert all(f"\n  {name} " in out for name in names)
    assert "baseline: timm eager" in out
    found = read_records(tmp_path / "cpu" / "backbone.jsonl")
    (share,) = [r.roofline for r in found if r.provider == "ours frozen" and r.metric == "ms"]
    assert share is not None
    assert {found_one.provider for found_one in found} == {*names}
    for name in names:
        values = {r.metric: r.p50 for r in found if r.provider == name}
        assert set(values) == {
            "ms", "p99 ms", "img/s", "first call s", "compile s", "max error", "mean error", "top-1 agreement",
        }  # fmt: skip
        assert 0 < values["mean error"] < values["max error"] < 1e-5
        assert values["top-1 agreement"] == 1.0

    assert main([*call, *names]) == 0
    assert "1 of 1 cells are measured already" in capsys.readouterr().out
    assert main([*call, "ours eager", "--list"]) == 0
    assert "measured  efficientformer_l1, 2x3x224x224, float32: 1 rungs" in capsys.readouterr().out


@pytest.mark.parametrize(("failure", "status"), [(TimeoutError(), 75), (FailedError("no luck"), 1)])
def test_exit_status(
    failure: Exception, status: int, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(*_: Any, device: Any) -> Figures:
        raise failure

    monkeypatch.setattr(backbone, "in_process", fail)
    call = ["bench", "--device", "cpu", "--batch-size", "1", "--dtype", "float32", "--output", str(tmp_path)]
    assert main([*call, "--provider", "ours eager"]) == status
    captured = capsys.readouterr()
    assert ("1 of 1 cells remain" in captured.out) == (status == 75)
    assert ("ours eager failed" in captured.err) == (status == 1)


def test_wrong_provider(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "run", "--device", "cpu", "--provider", "timm"]) == 1
    assert "--provider: got 'timm', allowed are 'timm eager'," in capsys.readouterr().err


def test_bare_bench_is_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found: list[Callable[..., Any]] = []
    monkeypatch.setattr("effformer.commands.bench.main", lambda arguments: found.append(arguments.minutes) or 0)
    assert main(["bench"]) == main(["bench", "--minutes", "2"]) == main(["bench", "run"]) == 0
    assert found == [9.0, 2.0, 9.0]
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--minutes", "2", "tune"])
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "--help"])
    assert {"run", "tune"} <= set(capsys.readouterr().out.split())
