"""`effformer verify --backward`: gradients by kernels against float64, interpreted and as compiled."""

from __future__ import annotations

import json

import pytest
import torch
from compiling import needs_compiler, start
from machine import DEVICE

from effformer.accuracy import Accuracy, ParameterAccuracy
from effformer.apps import verify_gradients
from effformer.apps.verify import checks
from effformer.apps.verify_gradients import Found, arguments_of, gradient_checks
from effformer.apps.verify_report import Check
from effformer.cli import main
from effformer.workload import DIFFERENTIABLE

pytestmark = pytest.mark.usefixtures("kernel_device")
SMALL = Check("meta4d", (2, 20, 5, 7), torch.float16, {"hidden": 56}, ("here",))


def test_checks_are_of_every_argument_of_what_has_gradients() -> None:
    found = gradient_checks(checks(dtypes=[torch.float16], size=(64, 64)))
    names = {check.operation for check in found}
    operations = (*DIFFERENTIABLE, "meta4d_train")
    assert names == {f"{operation}/{name}" for operation in operations for name in arguments_of(operation)}
    assert arguments_of("pool_mixer") == ["x", "layer_scale"]
    assert len(arguments_of("meta4d")) == 8
    assert len(arguments_of("meta4d_train")) == 11


def test_each_gradient_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    todo = gradient_checks([SMALL])
    found = list(verify_gradients.verify_gradients(todo, DEVICE))
    assert [one.check for one in found] == todo
    assert all(one.verdict == "pass" for one in found), [one.problems for one in found]
    assert {type(one.accuracy) for one in found} == {Accuracy, ParameterAccuracy}
    assert {"mlp_backward", "pool_mixer_backward"} <= {ran.kernel for ran in found[0].ran}

    true = verify_gradients.Gradients.by

    def shifted(self: verify_gradients.Gradients, backend: str) -> Found:
        found = true(self, backend)
        if backend == "triton":
            found.gradients[4] *= 1.1
        return found

    monkeypatch.setattr(verify_gradients.Gradients, "by", shifted)
    found = list(verify_gradients.verify_gradients(todo, DEVICE, repeats=0))
    failed = [one.check.operation for one in found if one.verdict == "fail"]
    assert failed == ["meta4d/shift1", "meta4d_train/norm_weight1"]


def test_other_bits_and_errors_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    true, calls = verify_gradients.Gradients.by, []

    def unsteady(self: verify_gradients.Gradients, backend: str) -> Found:
        calls.append(backend)
        result, gradients = true(self, backend)
        return Found(result, [None if one is None else one + 1e-4 * (len(calls) % 3 == 2) for one in gradients])

    monkeypatch.setattr(verify_gradients.Gradients, "by", unsteady)
    found = list(verify_gradients.verify_gradients(gradient_checks([SMALL]), DEVICE, repeats=1))
    assert all("1 of 1 more runs gave another result" in one.problems for one in found)

    def fail(self: verify_gradients.Gradients, backend: str) -> Found:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(verify_gradients.Gradients, "by", fail)
    found = list(verify_gradients.verify_gradients(gradient_checks([SMALL]), DEVICE))
    assert {one.raised for one in found} == {"RuntimeError: out of memory"}


def test_the_rule_for_parameters() -> None:
    errors = {"eager_max_error": 1.0, "eager_mean_error": 0.1, "ulp": 0.0, "misplaced": 0}
    assert ParameterAccuracy(max_error=3.0, mean_error=0.3, **errors).passes()
    assert not ParameterAccuracy(max_error=3.1, mean_error=0.3, **errors).passes()
    assert not ParameterAccuracy(max_error=3.0, mean_error=0.31, **errors).passes()
    assert not ParameterAccuracy(max_error=1.0, mean_error=0.1, **errors | {"misplaced": 1}).passes()
    assert not Accuracy(max_error=2.1, mean_error=0.1, **errors).passes()


def test_the_command_refuses_what_has_no_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--backward", "--op", "head"]) == 1
    allowed = ", ".join((*DIFFERENTIABLE, "all"))
    assert f"--op: got 'head' with --backward, allowed are {allowed}" in capsys.readouterr().err


@needs_compiler
def test_the_command_as_compiled() -> None:
    words = [
        "verify",
        "--backward",
        "--op",
        "pool_mixer",
        "--dtype",
        "bf16",
        "--size",
        "32x32",
        "--target",
        "sm_90",
        "--json",
    ]
    done = start("-m", "effformer.cli", *words)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["backward"], report["passed"]) == (True, True)
    assert {one["operation"] for one in report["checks"]} == {"pool_mixer/x", "pool_mixer/layer_scale"}
    assert all(one["faults"] == [] and one["backend"] == "triton" for one in report["checks"])
