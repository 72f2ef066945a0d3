"""`effformer verify`: its checks, its output, and its settings."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from effformer.kernels import launch
from effformer.kernels.tiling.choose import Question, mlp_config
from effformer.kernels.tiling.device import HOPPER
from effformer.kernels.tiling.table import MlpConfig
from torch import Tensor
from verify_command import SMALL, report, run

from effformer import backend, create_model, list_models, ops, reference
from effformer.apps import verify as verification
from effformer.apps.verify import CHECKED, NETWORK, checks, verify, why_not_verified
from effformer.apps.verify_report import Check
from effformer.backend import TRITON_DTYPES
from effformer.config import PRESETS
from effformer.testing import Case, draw_map, pool_mixer_case

pytestmark = pytest.mark.usefixtures("narrow_preset")
CPU = torch.device("cpu")
L1, L3, L7 = list_models()


# --- what is checked --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(224, 224), (65, 130)])
@pytest.mark.parametrize("name", [L1, L3, L7])
def test_every_shape_that_a_network_has(name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded while the network runs; the MLP and the pooling alone, and attention alone, have those of their blocks."""
    called: dict[str, list[tuple[int, ...]]] = {}

    def spy(operation: str) -> Callable[..., Tensor]:
        original = getattr(ops, operation)

        def call(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
            called.setdefault(operation, []).append((*x.shape, *(a.shape[0] for a in arguments if a.ndim == 2)))
            return original(x, *arguments, **options)

        return call

    for operation in ("meta4d", "attention_mixer", "linear_mlp"):
        monkeypatch.setattr(ops, operation, spy(operation))
    network = create_model(name, device="meta", backend="eager").eval()
    with torch.no_grad():
        network(torch.empty(2, 3, *size, device="meta"))

    found = checks([name], dtypes=[torch.float16], size=size, batch_size=2)
    drawn: dict[str, list[tuple[int, ...]]] = {operation: [] for operation in CHECKED}
    for check in found:
        case = verification.draw(check, CPU) if check.operation != NETWORK and size == (65, 130) else None
        if case is None:
            drawn[check.operation].append(check.shape)
            continue
        x, *others = case.arguments
        assert x.shape == check.shape
        drawn[check.operation].append((*x.shape, *(a.shape[0] for a in others if a.ndim == 2)))
    for operation, calls in called.items():
        want = [shape if size == (65, 130) else shape[: 4 if operation == "meta4d" else 3] for shape in calls]
        assert drawn[operation] == list(dict.fromkeys(want)), operation
    assert drawn["conv_mlp"] == drawn["meta4d"]
    assert [shape[:4] for shape in drawn["pool_mixer"]] == [shape[:4] for shape in drawn["meta4d"]]
    batch, tokens = drawn["attention_mixer"][0][:2]
    assert drawn["bias_attention"] == [(batch, tokens, 8 * (32 + 32 + 128))]
    assert drawn[NETWORK] == [(2, 3, *size)]


def test_equal_shapes_are_checked_once() -> None:
    found = checks([L1, L3, L7], size=(64, 64), batch_size=3)
    assert len({(check.operation, check.shape, check.dtype, *check.options.items()) for check in found}) == len(found)
    shared = [check for check in found if check.operation == "bias_attention"]
    assert len(shared) == 3
    for check in shared:
        assert check.where == tuple(f"{name} stage 4" for name in (L1, L3, L7))
    assert [check.name for check in found if check.operation == NETWORK][::3] == [L1, L3, L7]


def test_options_choose(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[Check]] = []

    def nothing(todo: list[Check], *_: Any, **__: Any) -> list[Any]:
        asked.append(todo)
        return []

    monkeypatch.setattr("effformer.apps.verify.verify", nothing)
    run(capsys)
    assert {check.operation for check in asked[-1]} == set(CHECKED)
    assert {check.dtype for check in asked[-1]} == {torch.float16, torch.bfloat16, torch.float32}
    assert {where.split()[0] for check in asked[-1] for where in check.where} == {"efficientformer_l1"}
    assert asked[-1][-1].shape[2:] == (224, 224)
    operations, models = ("--op", "network", "meta4d"), ("--model", "l1", L7)
    options = (*operations, *models, "--dtype", "half", "fp32")
    run(capsys, *options, "--size", "32x48", "--batch-size", "5")
    assert [check.operation for check in asked[-1]].count(NETWORK) == 4
    assert {check.operation for check in asked[-1]} == {NETWORK, "meta4d"}
    assert {check.dtype for check in asked[-1]} == {torch.float16, torch.float32}
    assert asked[-1][-1].shape == (5, 3, 32, 48)
    run(capsys, "--model", "all", "--op", "all", "--dtype", "all")
    assert set(asked[-1]) == set(checks(PRESETS, CHECKED, TRITON_DTYPES))
    with pytest.raises(ValueError, match="batch_size: got 0"):
        checks(batch_size=0)
    with pytest.raises(ValueError, match="operations: got 'softmax'"):
        checks(operations=["softmax"])


# --- what is said -----------------------------------------------------------------------------------------------------


def test_all_of_l1(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = report(capsys, *SMALL, "bf16", "--seed", "3")
    assert status == 0
    assert found["passed"] is True
    assert found["counts"] == {"pass": 22, "fail": 0, "skipped": 22}
    assert found["why_no_kernel"] is None
    assert found["versions"]["torch"] == torch.__version__
    assert (found["device"], found["interpreted"]) == ("cpu", True)
    assert (found["size"], found["batch_size"], found["seed"], found["repeats"]) == ([32, 64], 1, 3, 0)
    keys = found["checks"][0].keys()
    for check in found["checks"]:
        assert check.keys() == keys
        if check["dtype"] == "bfloat16":
            assert (check["verdict"], check["backend"], check["ran"]) == ("skipped", "eager", [])
            assert check["skipped"] == "Triton's interpreter does not compute torch.bfloat16"
            assert check["max_error"] is None
            continue
        assert (check["verdict"], check["backend"], check["problems"]) == ("pass", "triton", [])
        assert check["max_error"] > 0
        assert check["ratio"] == check["max_error"] / check["eager_max_error"]
        assert check["mean_ratio"] == check["mean_error"] / check["eager_mean_error"]
        assert check["misplaced"] == 0
        assert all(ran["times"] and ran["configuration"]["num_warps"] for ran in check["ran"])
    by_name = {(check["operation"], check["shape"][1], check["dtype"]): check for check in found["checks"]}
    (ran,) = by_name["meta4d", 48, "float16"]["ran"]
    assert (ran["kernel"], ran["times"], ran["configuration"]["BLOCK_H"]) == ("mlp", 1, 64)
    assert [ran["kernel"] for ran in by_name["linear_mlp", 2, "float16"]["ran"]] == [
        "layer_norm",
        "split_mlp",
        "split_sum",
    ]


def test_all_of_a_network_in_float32(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = report(capsys, "--model", "narrow", "--device", "cpu", "--size", "32x64", "--dtype", "float32")
    assert status == 0
    assert found["counts"] == {"pass": 22, "fail": 0, "skipped": 0}
    assert found["batch_size"] == 2


def test_the_numbers_are_those_of_the_drawn_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    _, found = report(capsys, *SMALL, "--op", "pool_mixer", "--seed", "5")
    torch.manual_seed(5)
    x, layer_scale = pool_mixer_case(draw_map((1, 96, 4, 8), torch.float16)).arguments
    exact = reference.pool_mixer(x.double(), layer_scale.double())
    errors = (ops.pool_mixer(x, layer_scale, backend="triton").double() - exact).abs()
    eager = (reference.pool_mixer(x, layer_scale).double() - exact).abs()
    check = found["checks"][1]
    assert check["shape"] == [1, 96, 4, 8]
    for name, want in (("max_error", errors.max()), ("mean_error", errors.mean())):
        assert math.isclose(check[name], want.item(), rel_tol=1e-12)
    for name, want in (("eager_max_error", eager.max()), ("eager_mean_error", eager.mean())):
        assert math.isclose(check[name], want.item(), rel_tol=1e-12)
    _, other = report(capsys, *SMALL, "--op", "pool_mixer", "--seed", "6")
    assert other["checks"][1]["mean_error"] != check["mean_error"]


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(capsys, *SMALL, "bfloat16", "--op", "meta4d")
    assert status == 0
    lines = out.splitlines()
    assert lines[-1] == "4 of 4 pass; 4 not run: Triton's interpreter does not compute torch.bfloat16"
    (line,) = (line for line in lines if "1x48x8x16" in line)
    assert line.split()[:3] == ["meta4d", "1x48x8x16", "float16"]
    tiles = mlp_config(Question("meta4d", torch.float16, (48, 128)), HOPPER)
    assert isinstance(tiles, MlpConfig)
    warps, stages = f"warps={tiles.num_warps}", f"stages={tiles.num_stages}"
    words = ["mlp", f"M={tiles.block_m}", f"H={tiles.block_h}", "widths=32+16", warps, stages]
    assert line.split()[8:] == ["pass", "triton", *words]
    assert len([line for line in lines if line.startswith("meta4d")]) == 4


def test_in_a_process_of_its_own() -> None:
    """The command itself tells Triton to interpret; all but the JSON document goes to stderr."""
    code = "import sys\nfrom effformer.cli import main\nsys.exit(main(sys.argv[1:]))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, "verify", *SMALL, "--size", "32", "--op", "bias_attention", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"] == {"pass": 1, "fail": 0, "skipped": 0}
    assert done.stderr.splitlines()[-1] == "1 of 1 pass"


# --- where no kernel can run ------------------------------------------------------------------------------------------


def test_without_triton(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    status, out = run(capsys, "--device", "cpu")
    assert status == 1
    assert out.splitlines()[-1] == "no kernel was verified: Triton is not installed"
    assert "pool_mixer" not in out
    status, found = report(capsys, "--device", "cpu")
    assert status == 1
    assert found["why_no_kernel"] == "Triton is not installed"
    assert found["counts"] == {"pass": 0, "fail": 0, "skipped": 66}


def test_where_triton_was_imported_to_compile(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    status, out = run(capsys, "--device", "cpu")
    assert status == 1
    assert "no kernel was verified: 'cpu' is not an NVIDIA GPU, and Triton interprets only" in out.splitlines()[-1]


def test_only_what_the_interpreter_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = run(capsys, "--device", "cpu", "--dtype", "bfloat16", "--op", "meta4d")
    assert status == 1
    assert out.splitlines()[-1] == "no kernel was verified: Triton's interpreter does not compute torch.bfloat16"


def test_a_gpu_is_not_verified_by_interpretation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "why_not_triton", lambda *_, **__: None)
    monkeypatch.setattr(launch, "INTERPRETED", True)
    assert "TRITON_INTERPRET is set" in str(why_not_verified(torch.device("cuda", 0), torch.float16))
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert why_not_verified(torch.device("cuda", 0), torch.float16) is None


# --- how it runs ------------------------------------------------------------------------------------------------------


def test_settings_while_it_runs_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and eager PyTorch without TF32, the caller's random numbers and settings as they were."""

    def settings() -> tuple[object, ...]:
        matmul, conv = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
        return matmul, conv, torch.are_deterministic_algorithms_enabled()

    seen: dict[str, tuple[object, ...]] = {}
    original = Case.run

    def run(self: Case, backend: str) -> Tensor:
        seen[backend] = settings()
        return original(self, backend)

    monkeypatch.setattr(Case, "run", run)
    before, state = settings(), torch.random.get_rng_state()
    todo = checks(operations=["pool_mixer"], dtypes=[torch.float16], size=(32, 32))
    assert all(outcome.verdict == "pass" for outcome in verify(todo, CPU))
    assert seen == {"triton": ("ieee", "ieee", True), "eager": ("ieee", "ieee", False)}
    assert settings() == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert "ieee" not in before


def test_drawn_networks_are_worth_checking() -> None:
    (check,) = checks(operations=[NETWORK], dtypes=[torch.float16], size=(32, 64))
    subject = verification.draw(check, CPU)
    exact = subject.exact()
    assert exact.dtype == torch.float64
    assert exact.shape == (2, 2, 448)
    assert exact.std() > 0.1
    assert subject.run("eager").dtype == torch.float16


@pytest.mark.gpu
def test_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = report(capsys, "--device", "cuda", "--size", "96x128")
    assert status == 0, [check["problems"] for check in found["checks"] if check["problems"]]
    assert found["counts"] == {"pass": 48, "fail": 0, "skipped": 0}
    assert all(check["repeated"] == 3 for check in found["checks"])
