"""The faults that `effformer verify` finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from effformer.kernels import launch
from torch import Tensor
from verify_command import SMALL, report, run

from effformer.apps.verify import NETWORK
from effformer.testing import Case

pytestmark = pytest.mark.usefixtures("narrow_preset")
NARROW = ("--model", "narrow", *SMALL)


def failing(found: dict[str, Any]) -> set[str]:
    """Names of the operations of which a check fails."""
    return {check["operation"] for check in found["checks"] if check["verdict"] == "fail"}


def plant(monkeypatch: pytest.MonkeyPatch, change: Callable[[launch.Launch], launch.Launch]) -> None:
    """Have every launch run as `change` makes it."""
    original = launch.Launch.run
    monkeypatch.setattr(launch.Launch, "run", lambda self: original(change(self)))


def argument(kernel: str, name: str, value: Callable[[Any], Any]) -> Callable[[launch.Launch], launch.Launch]:
    def change(one: launch.Launch) -> launch.Launch:
        if one.kernel.__name__ != kernel or one.arguments[name] is None:
            return one
        return replace(one, arguments=one.arguments | {name: value(one.arguments[name])})

    return change


def constant(kernel: str, name: str, value: Any) -> Callable[[launch.Launch], launch.Launch]:
    def change(one: launch.Launch) -> launch.Launch:
        return replace(one, constants=one.constants | {name: value}) if one.kernel.__name__ == kernel else one

    return change


def fewer_programs(one: launch.Launch) -> launch.Launch:
    return replace(one, grid=one.grid - 1) if one.kernel.__name__ == "layer_norm_kernel" else one


ATTENTION, TOKENS = {"bias_attention", "attention_mixer"}, {"attention_mixer", "linear_mlp"}


@pytest.mark.usefixtures("many_rows")  # which the kernels are chosen for in which the faults are
@pytest.mark.parametrize(
    ("fault", "caught"),
    [
        (argument("bias_attention_kernel", "bias_ptr", torch.zeros_like), {*ATTENTION, NETWORK}),
        (argument("bias_attention_kernel", "bias_ptr", lambda bias: bias.flip(0)), {*ATTENTION, NETWORK}),
        (constant("bias_attention_kernel", "SCALE", 1.0), {*ATTENTION, NETWORK}),
        (argument("mlp_kernel", "layer_scale_ptr", torch.ones_like), {"meta4d", NETWORK}),
        (argument("mlp_kernel", "shift1_ptr", torch.zeros_like), {"conv_mlp", "meta4d", NETWORK}),
        (argument("linear_kernel", "residual_ptr", lambda x: 2 * x), {"conv_mlp", "meta4d", *TOKENS, NETWORK}),
        (argument("pool_mixer_kernel", "layer_scale_ptr", torch.zeros_like), {"pool_mixer", "meta4d", NETWORK}),
        (constant("mlp_kernel", "ACTIVATION", "relu"), {"conv_mlp", "meta4d", NETWORK}),
        (fewer_programs, {*TOKENS, NETWORK}),
    ],
    ids=["bias", "heads", "scale", "layer scale", "shift", "residual", "pooling", "activation", "programs"],
)
def test_faults_are_caught(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[launch.Launch], launch.Launch],
    caught: set[str],
) -> None:
    plant(monkeypatch, fault)
    status, found = report(capsys, *NARROW)
    assert status == 1
    assert found["passed"] is False
    assert failing(found) == caught


def test_what_was_not_written_shows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda one: replace(one, grid=one.grid - 1))
    status, found = report(capsys, *NARROW, "--op", "pool_mixer")
    assert status == 1
    assert all(check["misplaced"] > 0 for check in found["checks"])
    status, out = run(capsys, *NARROW, "--op", "pool_mixer")
    assert "FAIL pool_mixer 1x16x8x16 float16: inaccurate: max" in out
    assert out.splitlines()[-1] == "0 of 4 pass"


def test_results_that_differ_from_run_to_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, runs = launch.Launch.run, []

    def noisy(self: launch.Launch) -> None:
        original(self)
        runs.append(self)
        out = self.arguments["out_ptr"]
        assert isinstance(out, Tensor)
        if len(runs) == 3:
            out.view(torch.int16)[-1, -1, -1, -1] += 1  # one element, by one bit

    monkeypatch.setattr(launch.Launch, "run", noisy)
    status, out = run(capsys, *NARROW, "--op", "pool_mixer", "--repeats", "3")
    assert status == 1
    assert "FAIL pool_mixer 1x16x8x16 float16: 1 of 3 more runs gave another result" in out
    assert out.splitlines()[-1] == "3 of 4 pass"
    assert len(runs) == 16


class OutOfMemory:
    """A kernel that cannot be launched."""

    __name__ = "bias_attention_kernel"

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        raise RuntimeError("out of resource: shared memory")


def test_an_error_is_one_checks_outcome(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda one: replace(one, kernel=OutOfMemory()) if "bias" in one.kernel.__name__ else one)
    operations = ("--op", "bias_attention", "linear_mlp")
    status, found = report(capsys, *NARROW, *operations)
    assert status == 1
    first, second = found["checks"]
    assert first["raised"] == "RuntimeError: out of resource: shared memory"
    assert [ran["kernel"] for ran in first["ran"]] == ["bias_attention"]
    assert first["max_error"] is None
    assert (first["verdict"], second["verdict"]) == ("fail", "pass")

    _, out = run(capsys, *NARROW, *operations)
    assert "FAIL bias_attention 1x2x96 float16: RuntimeError: out of resource: shared memory" in out
    assert out.splitlines()[-1] == "1 of 2 pass"


def test_eager_does_not_pass_for_the_kernels(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Case.run
    monkeypatch.setattr(Case, "run", lambda self, backend: original(self, "eager"))
    status, out = run(capsys, *NARROW, "--op", "meta4d")
    assert status == 1
    assert "FAIL meta4d 1x16x8x16 float16: no kernel was launched" in out
