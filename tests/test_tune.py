"""The search for tiles, on a CPU: candidates are compiled for Hopper, run by the interpreter, and timed by a fake clock."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from effformer.bench import tune
from effformer.bench.shapes import network_launches, unusual_launches
from effformer.bench.tune import Question, State, candidates, merged, question_of
from effformer.kernels import config
from effformer.kernels.config import shipped_table
from effformer.kernels.device import CONSUMER, HOPPER, Device
from effformer.kernels.launch import Launch, recorded
from effformer.kernels.table import Config, MlpConfig, as_text, read_table

from effformer import list_models
from effformer.verification import Check

CPU = torch.device("cpu")
H200 = Device(90, 232_448, "NVIDIA H200")
CHECK = Check("meta4d", (2, 32, 9, 8), torch.float16, {"hidden": 64}, ("here",))
OWN = MlpConfig(128, 64, False, 8, 1)  # the table's, for up to 48 channels
GOOD = MlpConfig(64, 32, True, 4, 1)
REFUSED = MlpConfig(64, 64, False, 2, 1)  # two warps are no warpgroup: HMMA


def test_the_question_is_what_the_launch_asked() -> None:
    """Its answer is the launch's configuration, at every shape of the networks."""
    for device in (HOPPER, CONSUMER):
        for dtype in (torch.float16, torch.float32):
            launches = [launch for *_, launch in unusual_launches(dtype, device)]
            for name in list_models():
                launches += [launch for *_, launch in network_launches(name, dtype, device, batch=3)]
            for launch in launches:
                question = question_of(launch)
                found = config.answer(question.operation, question.dtype, device, *question.sizes)
                if isinstance(found, MlpConfig):
                    of = launch.configuration
                    assert of["BLOCK_M"], of["BLOCK_H"] == (found.block_m, found.block_h)
                    assert of["RELOAD"] == found.reload
                assert launch.num_warps == found.num_warps
                assert launch.num_stages == getattr(found, "num_stages", launch.num_stages)


@pytest.mark.parametrize(
    "question",
    [
        Question("meta4d", torch.float16, (96, 1000)),
        Question("linear", torch.float16, (448, 1792, 12544)),
        Question("linear", torch.float16, (100, 100, 49)),
        Question("bias_attention", torch.float16, (49, 128)),
        Question("pool_mixer", torch.float16, (448, 1, 49)),
        Question("layer_norm", torch.float16, (448, 49)),
    ],
    ids=str,
)
def test_candidates_are_many_and_have_the_right_kind(question: Question) -> None:
    found = list(candidates(question))
    assert len(set(found)) == len(found) > 15
    kind = config.answer(question.operation, question.dtype, HOPPER, *question.sizes).__class__
    assert {c.__class__ for c in found} <= {kind, type(None)}
    assert (None in found) == (question.operation == "meta4d")
    for use in found:  # as a table would take them
        line = question.entry(use, H200).as_json()
        assert config.parse([json.loads(json.dumps(line))], Path("here"))[0].use == use


def fake_clock(times: dict[tuple[int, int], float]) -> Callable[[Callable[[], object], torch.device], float]:
    """Milliseconds by (BLOCK_M, BLOCK_H) of the kernel that a call launches; it must launch one."""

    def timer(call: Callable[[], object], device: torch.device) -> float:
        with recorded() as launches:
            call()
        assert launches
        first = launches[0].configuration
        return times.get((first["BLOCK_M"], first.get("BLOCK_H", 0)), 9.0)

    return timer


def search(state: State, proposed: list[Config | None], times: dict[tuple[int, int], float], seconds: float = 300):  # type: ignore[no-untyped-def]
    return list(
        tune.tune([CHECK], CPU, state, seconds=seconds, workers=1, timer=fake_clock(times), propose=lambda _: proposed)
    )


def test_the_fastest_that_is_sound_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before they are timed: one off the tensor cores, one that is wrong, one that gives other bits each time."""
    wrong, moving = MlpConfig(64, 16, True, 4, 1), MlpConfig(32, 32, True, 4, 1)
    run = Launch.run

    def broken(self: Launch) -> None:
        run(self)
        tiles = self.configuration["BLOCK_M"], self.configuration.get("BLOCK_H")
        if tiles == (64, 16):
            self.arguments["out_ptr"].mul_(1.25)  # type: ignore[union-attr]
        if tiles == (32, 32):
            out = self.arguments["out_ptr"]
            out.view(torch.int16).add_(int(torch.randint(0, 2, ())))  # type: ignore[union-attr]

    monkeypatch.setattr(Launch, "run", broken)
    state = State(tmp_path / "state.jsonl", H200)
    (tuned,) = search(
        state,
        [None, GOOD, wrong, moving, REFUSED],
        {(128, 64): 2.0, (64, 32): 1.0, (64, 16): 0.1, (32, 32): 0.1, (64, 64): 0.1},
    )
    assert tuned is not None
    assert (tuned.use, tuned.ms, tuned.table_ms, tuned.tried) == (GOOD, 1.0, 2.0, 3)
    assert tuned.refused == {"inaccurate": 1, "not repeatable": 1, "refused by the audit": 1}
    assert str(tuned).startswith("meta4d float16, channels 32, rows 144: 2000.0 -> 1000.0 us, MlpConfig(block_m=64")

    # Nothing is asked twice, in a later process either; other kernels or another card ask again.
    assert search(state, [], {}) == []
    assert search(State(state.path, H200), [], {}) == []
    assert State(state.path, Device(90, 232_448, "NVIDIA H100")).tuned == {}
    monkeypatch.setattr(tune, "fingerprint", lambda: {"kernels": "others", "triton": "3"})
    assert State(state.path, H200).tuned == {}


def test_a_gain_of_a_percent_changes_nothing_and_time_ends_the_search(tmp_path: Path) -> None:
    state = State(tmp_path / "state.jsonl", H200)
    assert search(state, [GOOD], {(128, 64): 2.0, (64, 32): 1.99}, seconds=0) == [None]
    assert state.tuned == {}
    (tuned,) = search(state, [GOOD], {(128, 64): 2.0, (64, 32): 1.99})
    assert (tuned.use, tuned.ms) == (OWN, 2.0)
    assert state.entries("NVIDIA H200") == []


def outcome(channels: int, rows: int, use: Config | None, ms: float) -> tune.Tuned:
    return tune.Tuned(Question("meta4d", torch.float16, (channels, rows)), use, ms, 2.0, 1, {})


def test_rows_become_bounds(tmp_path: Path) -> None:
    state = State(tmp_path / "state.jsonl", H200)
    slow, fast = MlpConfig(32, 16, True, 4, 1), MlpConfig(64, 64, True, 8, 2)
    for tuned in (
        outcome(48, 1000, OWN, 2.0),
        outcome(48, 90, slow, 1.0),
        outcome(64, 5, OWN, 2.0),
        outcome(96, 7, fast, 1.0),
    ):
        state.add(tuned)
    state.add(tune.Tuned(Question("bias_attention", torch.float16, (49, 128)), None, 2.0, 2.0, 1, {}))
    entries = State(state.path, H200).entries(None)
    assert [(entry.where, entry.use) for entry in entries] == [
        ((("channels", "=", 48), ("rows", "<=", 90)), slow),
        ((("channels", "=", 48),), OWN),
        ((("channels", "=", 96),), fast),
    ]
    with config.preferring(*entries):
        assert config.mlp_config("meta4d", 48, 90, torch.float16, HOPPER) == slow
        assert config.mlp_config("meta4d", 48, 91, torch.float16, HOPPER) == OWN
    assert state.entries("NVIDIA H200")[0].gpu == "NVIDIA H200"

    table = merged(entries, shipped_table().entries)
    file = tmp_path / "table.json"
    file.write_text(as_text(table))
    again = merged(entries, read_table(file))  # tuned once more: replaced, not repeated
    assert [entry.as_json() for entry in again] == [entry.as_json() for entry in table]
    assert len(table) == len(shipped_table().entries) + 3


def test_a_state_that_is_none_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"state.jsonl, line 1: no outcome of a search \('owner'\): delete the file"):
        State(path, H200)
