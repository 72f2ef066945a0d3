"""Measuring networks: order, providers, details of a run, and a narrow network from end to end."""

from __future__ import annotations

import json
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
from effformer.bench.measure import network_providers, network_run, networks, profile
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
from effformer.bench.measure.networks import in_order
from effformer.bench.measure.process import in_process
from effformer.bench.measure.records import read_records
from effformer.bench.measure.resume import FailedError
from effformer.bench.measure.timm_model import fold_batch_norm
from measurements import ONE
from torch import nn

from effformer import create_model
from effformer.cli import main
from effformer.testing import randomise

CPU = torch.device("cpu")
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


# --- order, providers -------------------------------------------------------------------------------------------------


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
    assert BY_NAME["timm eager"].why_not(ONE, CPU) == 'timm is not installed (pip install "timm>=1.0.16")'


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


# --- details ----------------------------------------------------------------------------------------------------------


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


# --- a process of its own ---------------------------------------------------------------------------------------------


def test_a_process_is_ended_with_all_that_it_started(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/started\nsleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        in_process(BY_NAME["ours eager"], ONE, "all", device=CPU, seconds=1.0)
    assert time.monotonic() - begin < 30
    stat = Path("/proc", (tmp_path / "started").read_text().strip(), "stat")
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() - begin < 30
        time.sleep(0.1)


def test_a_process_tells_why_it_failed(cache: Path) -> None:
    with pytest.raises(FailedError, match=r"^ValueError: .*no such model"):
        in_process(BY_NAME["ours eager"], ONE._replace(model="no such model"), "all", device=CPU)


def test_compiling_alone_measures_that_alone(small: None) -> None:
    found = network_run.compile_provider(BY_NAME["ours eager"], ONE, CPU)
    assert list(found.metrics) == ["compile s"]
    assert found.metrics["compile s"][1] > 0


# --- the command ------------------------------------------------------------------------------------------------------


def test_command(
    small: None, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(provider: NetworkProvider, one: Measurement, part: str, *, device: Any) -> Figures:
        found = network_run.measure_provider(provider, one, device, speed_alone=part == "speed")
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
