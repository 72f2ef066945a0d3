"""Results of the search for tiles: entries of a table, and the files that `effformer bench tune` writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from effformer.bench.offline import tune
from effformer.bench.offline.tune import State, Tuned, entry_of, merged, write_user_entries
from effformer.kernels.tiling import choose as config
from effformer.kernels.tiling.choose import (
    SHIPPED,
    Question,
    read_user_entries,
    shipped_table,
    user_file,
)
from effformer.kernels.tiling.device import HOPPER, Device
from effformer.kernels.tiling.table import AttentionConfig, Config, MlpConfig, as_text, read_entry, read_table
from tuner_cases import H200, OWN

from effformer.apps.verify_report import Check
from effformer.cli import main

pytestmark = pytest.mark.usefixtures("few_repeats")


# --- what becomes of it -----------------------------------------------------------------------------------------------


def outcome(channels: int, rows: int, use: Config | None) -> Tuned:
    question = Question("meta4d", torch.float16, (channels, rows))
    own = config.mlp_config(question, HOPPER)
    return Tuned(question, own, use or own, 1.0, 2.0, 1, {})


SLOW, FAST = MlpConfig(32, 16, True, 4, 1), MlpConfig(64, 64, True, 8, 2)
OUTCOMES = (outcome(48, 1000, None), outcome(48, 90, SLOW), outcome(64, 5, None), outcome(96, 7, FAST))


def test_rows_become_bounds(tmp_path: Path) -> None:
    state = State(tmp_path / "state.jsonl", H200)
    for tuned in OUTCOMES:
        state.add(tuned)
    attention = AttentionConfig(64, 64, 4, 1)
    state.add(Tuned(Question("bias_attention", torch.float16, (49, 128)), attention, attention, 2.0, 2.0, 1, {}))
    entries = State(state.path, H200).entries(None)
    assert [(entry.where, entry.use) for entry in entries] == [
        ((("channels", "=", 48), ("rows", "<=", 90)), SLOW),
        ((("channels", "=", 48),), OWN),
        ((("channels", "=", 96),), FAST),
    ]
    with config.preferring(*entries):
        assert config.mlp_config(Question("meta4d", torch.float16, (48, 90)), HOPPER) == SLOW
        assert config.mlp_config(Question("meta4d", torch.float16, (48, 91)), HOPPER) == OWN
    assert state.entries("NVIDIA H200")[0].gpu == "NVIDIA H200"
    assert all(entry.exact for entry in entries)
    assert not any(entry.exact for entry in shipped_table().entries)

    table = merged(entries, shipped_table().entries)
    file = tmp_path / "table.json"
    file.write_text(as_text(table))
    again = merged(entries, read_table(file))  # tuned once more: replaced, not repeated
    assert [entry.as_json() for entry in again] == [entry.as_json() for entry in table]
    assert len(table) == len(shipped_table().entries) + 3


def test_a_state_that_is_none_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    path.write_text("{}\n")
    with pytest.raises(
        ValueError, match=r"state.jsonl, line 1: not an outcome of a search \('owner'\): delete the file"
    ):
        State(path, H200)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_h200(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Tuned | None]:
    """`effformer bench tune` with a GPU that is not there, and with these outcomes."""
    found: list[Tuned | None] = list(OUTCOMES)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("effformer.commands.common.torch_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr("effformer.apps.verify.why_not_verified", lambda _: None)
    monkeypatch.setattr("effformer.kernels.tiling.device.device_of", lambda _: H200)

    def fake(
        todo: list[Check], device: torch.device, state: State, *, seconds: float, **_: object
    ) -> Iterator[Tuned | None]:
        assert {check.operation for check in todo} == {
            "pool_mixer",
            "conv_mlp",
            "meta4d",
            "bias_attention",
            "attention_mixer",
            "linear_mlp",
            "conv_norm",
            "head",
        }
        assert {check.dtype for check in todo} == {torch.float16, torch.bfloat16}
        assert {check.shape[0] for check in todo} == {256, 1}
        assert seconds > 1e6, "until all is done"
        for tuned in found:
            if isinstance(tuned, Exception):
                raise tuned
            if tuned:
                state.add(tuned)
            yield tuned

    monkeypatch.setattr(tune, "tune", fake)
    return found


def test_command_writes_the_users_file(on_h200: list[Tuned | None], capsys: pytest.CaptureFixture[str]) -> None:
    other = entry_of(Question("meta4d", torch.float16, (48, 9)), SLOW, Device(80, 166_912, "NVIDIA A100"))
    write_user_entries(user_file(), [other])
    assert main(["bench", "tune"]) == 0
    entries = read_user_entries(user_file())
    assert [entry.gpu for entry in entries] == ["NVIDIA A100", *["NVIDIA H200"] * 3]
    assert str(user_file()) in capsys.readouterr().out
    on_h200[:] = [None]
    assert main(["bench", "tune"]) == os.EX_TEMPFAIL
    assert "the same command goes on" in capsys.readouterr().out
    assert len(read_user_entries(user_file())) == 4, "what was known stays"
    on_h200[:] = [tune.DeviceLostError("it broke")]  # type: ignore[list-item]
    assert main(["bench", "tune"]) == os.EX_TEMPFAIL
    assert "it broke; the same command goes on without it" in capsys.readouterr().err
    on_h200[:] = [replace(OUTCOMES[0], fault="inaccurate")]
    assert main(["bench", "tune"]) == 1


def test_command_writes_a_table(on_h200: list[Tuned | None], tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    assert main(["bench", "tune", "--in-place", str(table)]) == 0
    assert [entry.gpu for entry in read_table(table)] == [None] * (len(read_table(SHIPPED)) + 3)
    kept = read_entry(
        {
            "operation": "layer_norm",
            "device": "sm_90",
            "dtype": "float16",
            "where": {"channels": 3},
            "use": {"elements": 64, "num_warps": 1},
        },
        "mine",
    )
    table.write_text(as_text([kept]))
    assert main(["bench", "tune", "--in-place", str(table)]) == 0
    assert len(read_table(table)) == 4, "added to what FILE holds"
    assert not user_file().exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--device: got cpu, allowed is a GPU that the kernels run on (it is not a GPU)"),
        (["--minutes", "0"], "argument --minutes: got '0', allowed is a number of minutes above 0"),
        (["--minutes", "x"], "argument --minutes: got 'x'"),
        (["--batch-size", "0"], "got '0', allowed is a whole number of 1 or more"),
    ],
)
def test_wrong_calls(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["bench", "tune", *arguments])
    except SystemExit as exit:
        status = int(str(exit.code))
    assert status in (1, 2)
    assert message in capsys.readouterr().err
