"""The search for tiles, on a CPU: candidates are compiled for Hopper, run by the interpreter, and timed by a fake clock."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from effformer.bench.offline import tune
from effformer.bench.offline.candidates import candidates
from effformer.bench.offline.launches import network_launches, unusual_launches
from effformer.bench.offline.tune import State, entry_of
from effformer.kernels import conv_norm, launch
from effformer.kernels.launch import INTERPRETED, Launch, recorded
from effformer.kernels.tiling import choose as config
from effformer.kernels.tiling.choose import Question, shipped_table
from effformer.kernels.tiling.device import AMPERE, CONSUMER, HOPPER, Device
from effformer.kernels.tiling.table import Config, LinearConfig, MlpConfig, SplitConfig
from tuner_cases import H200, OWN

from effformer import list_models
from effformer.apps.verify_report import Check

pytestmark = pytest.mark.usefixtures("few_repeats")
CPU = torch.device("cpu")
CHECK = Check("meta4d", (2, 32, 9, 8), torch.float16, {"hidden": 64}, ("here",))
OWN_TILES = OWN.block_m, OWN.block_h
GOOD = MlpConfig(64, 32, True, 4, 1)
LUCKY = MlpConfig(128, 32, True, 8, 1)
REFUSED = MlpConfig(128, 16, False, 2, 1)  # two warps do not make a warpgroup: HMMA


def test_the_question_is_what_the_launch_asked() -> None:
    """Its answer is the launch's configuration, at every shape of the networks."""
    for device in (HOPPER, CONSUMER):
        for dtype in (torch.float16, torch.float32):
            with config.asked() as asked:
                launches = [one for *_, one in unusual_launches(dtype, device)]
                for name in list_models():
                    launches += [one for *_, one in network_launches(name, dtype, device, batch=3)]
            launches = [one for one in launches if one.question]
            assert {one.question for one in launches} <= set(asked)
            for one in launches:
                found, of = config.answer(one.question, device), one.configuration
                if isinstance(found, MlpConfig):
                    assert (of["BLOCK_M"], of["BLOCK_H"]) == (found.block_m, found.block_h)
                    assert of["RELOAD"] == found.reload
                if isinstance(found, SplitConfig):
                    assert (of["BLOCK_M"], of["BLOCK_H"], of["CHUNK"]) == (found.block_m, found.block_h, found.chunk)
                if isinstance(found, LinearConfig):
                    assert of["BLOCK_M"] == found.block_m
                assert one.num_warps == found.num_warps
                assert one.num_stages == getattr(found, "num_stages", one.num_stages)


QUESTIONS = [
    Question("meta4d", torch.float16, (96, 100_000)),
    Question("meta4d", torch.float16, (224, 196)),
    Question("linear_mlp", torch.float16, (448, 49)),
    Question("linear", torch.float16, (448, 1792, 12544)),
    Question("linear", torch.float16, (100, 100, 49)),
    Question("bias_attention", torch.float16, (49, 128)),
    Question("pool_mixer", torch.float16, (448, 1, 49)),
    Question("split_sum", torch.float16, (448, 49)),
    Question("layer_norm", torch.float16, (448, 49)),
]


@pytest.mark.parametrize("device", [HOPPER, AMPERE], ids=["hopper", "ampere"])
@pytest.mark.parametrize("question", QUESTIONS, ids=tune.describe)
def test_candidates_are_many_and_have_the_right_kind(question: Question, device: Device) -> None:
    found = list(candidates(question, device))
    assert len(set(found)) == len(found)
    assert 15 < len(found) <= 100
    operation, _, sizes = question
    kind = config.answer(question, HOPPER).__class__
    mlp = operation in ("meta4d", "linear_mlp")
    kinds = {MlpConfig, SplitConfig} if operation == "meta4d" and sizes[1] < 1000 else {kind}
    assert {c.__class__ for c in found} == kinds | ({type(None)} if mlp else set())
    for use in found:  # as a table would take them
        line = entry_of(question, use, H200).as_json()
        assert config.parse([json.loads(json.dumps(line))], Path("here"))[0].use == use


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("operation", ["meta4d", "conv_mlp", "linear_mlp"])
def test_what_ptxas_gets_wrong_on_hopper_is_not_tried_there(operation: str, dtype: torch.dtype) -> None:
    """MLPs of 64 rows by 8 warps, fused or split."""
    question = Question(operation, dtype, (224, 1000))
    everywhere, on_h200 = list(candidates(question, AMPERE)), list(candidates(question, H200))
    left_out = [use for use in everywhere if use not in on_h200]
    assert on_h200 == [use for use in everywhere if use not in left_out]
    assert {(use.block_m, use.num_warps) for use in left_out if isinstance(use, MlpConfig | SplitConfig)} == (
        set() if (operation, dtype) == ("linear_mlp", torch.float32) else {(64, 8)}
    )
    kinds = {MlpConfig: operation != "linear_mlp", SplitConfig: dtype == torch.float16}
    assert {use.__class__ for use in left_out} == {kind for kind, tried in kinds.items() if tried}
    products = Question("linear", torch.float16, (448, 1792, 12544))
    assert list(candidates(products, H200)) == list(candidates(products, AMPERE))


# --- searching --------------------------------------------------------------------------------------------------------

interpreted = pytest.mark.skipif(not INTERPRETED, reason="searches on the CPU, which takes Triton's interpreter")


def fake_clock(times: dict[tuple[int, int], list[float]]) -> Callable[[Callable[[], object], torch.device], float]:
    """Milliseconds by (BLOCK_M, BLOCK_H) of the first kernel that a call launches, one after another; the last stays."""

    def timer(call: Callable[[], object], device: torch.device) -> float:
        with recorded() as launches:
            call()
        first = launches[0].configuration
        left = times.get((first["BLOCK_M"], first.get("BLOCK_H", 0)), [9.0])
        return left.pop(0) if len(left) > 1 else left[0]

    return timer


def search(
    state: State, proposed: list[Config | None], times: dict[tuple[int, int], list[float]], seconds: float = 300
):  # type: ignore[no-untyped-def]
    """Outcomes for the block itself; its products are fused, and ask nothing."""
    return list(
        tune.tune([CHECK], CPU, state, seconds=seconds, workers=2, timer=fake_clock(times), propose=lambda *_: proposed)
    )


@interpreted
def test_the_fastest_that_is_sound_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before they are timed: one that raises, one off the tensor cores, one that is wrong, one that leaves some
    of its output unwritten, one that gives other bits each time."""
    wrong, moving, lazy, raising = (MlpConfig(*tiles, True, 4, 1) for tiles in ((64, 16), (32, 32), (32, 64), (32, 16)))
    run = Launch.run
    calls = 0

    def broken(self: Launch) -> None:
        nonlocal calls
        tiles = self.configuration["BLOCK_M"], self.configuration.get("BLOCK_H")
        if not launch._runs.get():
            run(self)
            return
        out = self.arguments["out_ptr"]
        assert isinstance(out, torch.Tensor)
        if tiles == (32, 16):
            raise MemoryError
        before = out[0, :, 0, 0].clone()
        run(self)
        if tiles == (64, 16):
            out.mul_(1.25)
        if tiles == (32, 64):
            out[0, :, 0, 0] = before
        if tiles == (32, 32):
            calls += 1
            out[0, 0, 0, 0] += 0.001 * calls

    monkeypatch.setattr(Launch, "run", broken)
    state = State(tmp_path / "state.jsonl", H200)
    times = {OWN_TILES: [5.0, 2.0], (64, 32): [1.0], (128, 32): [0.5, 3.0]}
    refused = [(64, 16), (32, 32), (32, 64), (32, 16), (128, 16)]
    (tuned,) = search(
        state,
        [None, GOOD, wrong, moving, lazy, raising, REFUSED, LUCKY],
        times | {tiles: [0.1] for tiles in refused},
    )
    assert tuned is not None
    # LUCKY was fastest once, and own slow once: the rounds at the end decide
    assert (tuned.own, tuned.use, tuned.ms, tuned.own_ms, tuned.tried) == (OWN, GOOD, 1.0, 2.0, 4)
    assert tuned.refused == {
        "inaccurate": 2,
        "not repeatable": 1,
        "failing (MemoryError)": 1,
        "refused by the audit": 1,
    }
    assert str(tuned).startswith("meta4d float16, channels 32, rows 144: 2000.0 -> 1000.0 us, MlpConfig(block_m=64")

    # Nothing is asked twice, in a later process either; other kernels or another card ask again.
    assert search(state, [], {}) == []
    assert search(State(state.path, H200), [], {}) == []
    assert State(state.path, Device(90, 232_448, "NVIDIA H100")).tuned == {}
    with monkeypatch.context() as patch:
        patch.setattr(tune, "fingerprint", lambda: {"kernels": "others", "triton": "3"})
        assert State(state.path, H200).tuned == {}
    other = replace(entry_of(tuned.question, GOOD, H200), gpu=None)
    with config.using(config.Table([other, *shipped_table().entries])):
        monkeypatch.setattr(tune, "preferring", lambda *_: contextlib.nullcontext())
        again = State(state.path, H200)
    assert again.tuned == {}, "the table has another answer now"
    assert again.trials[tuned.question][GOOD] == 1.0, "what candidates took stays true"


@interpreted
def test_time_ends_a_search_which_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.jsonl"
    assert search(State(path, H200), [GOOD], {}, seconds=0) == [None]
    assert not path.exists()

    # The clock jumps when the first candidate is timed: it is the last.
    state, clock = State(path, H200), time.monotonic
    timer = fake_clock({OWN_TILES: [2.0]})

    def slow(call: Callable[[], object], device: torch.device) -> float:
        monkeypatch.setattr(time, "monotonic", lambda: clock() + 1000)
        return timer(call, device)

    found = list(tune.tune([CHECK], CPU, state, seconds=300, workers=1, timer=slow, propose=lambda *_: [GOOD]))
    monkeypatch.setattr(time, "monotonic", clock)
    assert found == [None]
    state = State(path, H200)
    assert [*state.trials.values()] == [{OWN: 2.0}]

    # A gain of a percent changes nothing; OWN is timed in the rounds alone.
    (tuned,) = search(state, [GOOD], {OWN_TILES: [2.0], (64, 32): [1.99]})
    assert (tuned.use, tuned.ms, tuned.better) == (OWN, 2.0, False)
    assert state.entries("NVIDIA H200") == []


@interpreted
def test_tiles_of_the_table_that_fail_are_reported_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Launch.run

    def broken(self: Launch) -> None:
        run(self)
        if self.configuration["BLOCK_H"] == OWN_TILES[1] and launch._runs.get():
            self.arguments["out_ptr"].zero_()  # type: ignore[union-attr]

    monkeypatch.setattr(Launch, "run", broken)
    state = State(tmp_path / "state.jsonl", H200)
    (tuned,) = search(state, [GOOD], {})
    assert (tuned.use, tuned.own_ms, tuned.fault, tuned.better) == (GOOD, None, "inaccurate", True)
    assert "THE TABLE'S OWN CONFIGURATION FAILS" in str(tuned)
    assert State(state.path, H200).tuned == state.tuned


@interpreted
def test_products_are_tuned_before_the_blocks_that_compete_with_them(tmp_path: Path) -> None:
    """A block that the table takes apart asks for itself, for its pooling and for both products."""
    check = Check("meta4d", (1, 256, 2, 2), torch.float32, {"hidden": 16}, ("here",))
    state = State(tmp_path / "state.jsonl", H200)
    found = list(tune.tune([check], CPU, state, seconds=300, workers=1, timer=fake_clock({}), propose=lambda *_: []))
    asked = [tuned.question for tuned in found if tuned]
    assert [operation for operation, *_ in asked] == ["linear", "linear", "pool_mixer", "meta4d"]
    assert asked[-1] == ("meta4d", torch.float32, (256, 4))


@interpreted
def test_the_vendors_time_is_that_of_its_convolution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It launches none of our kernels: timing those alone would time nothing, and always win."""
    check = Check("conv_norm", (1, 24, 9, 7), torch.float16, {"outputs": 48, "activation": "relu"}, ())
    calls, by_vendor = [], conv_norm._by_vendor
    monkeypatch.setattr(conv_norm, "_by_vendor", lambda *arguments: calls.append(1) or by_vendor(*arguments))
    timed: list[tuple[int, int]] = []

    def timer(call: Callable[[], object], device: torch.device) -> float:
        before = len(calls)
        with recorded() as launches:
            call()
        timed.append((len(launches), len(calls) - before))
        return 1.0

    state = State(tmp_path / "state.jsonl", HOPPER)
    list(tune.tune([check], CPU, state, seconds=300, workers=1, timer=timer, propose=lambda *_: [None]))
    assert set(timed) == {(1, 0), (0, 1)}


def test_a_candidate_that_took_its_process_down_is_refused(tmp_path: Path) -> None:
    question = Question("meta4d", torch.float16, (32, 144))
    state = State(tmp_path / "state.jsonl", H200)
    state.note(question, GOOD, "broke off")
    with state.path.open("a") as file:
        file.write('{"owner": {"gpu"')  # and a line is cut off
    again = State(state.path, H200)
    assert again.trials == {question: {GOOD: "broke off"}}
    again.note(question, OWN, 3.0)
    assert State(state.path, H200).trials == {question: {GOOD: "broke off", OWN: 3.0}}
