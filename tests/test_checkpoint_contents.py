"""Weights in the files of many trainers: entries, prefixes, several sets of weights, damaged derived buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from l1_networks import assert_loaded
from small_networks import small
from torch import Tensor

from effformer import load_checkpoint
from effformer.checkpoints.contents import find_weights
from effformer.checkpoints.formats import CheckpointError, convert_state_dict

INDEX = "stages.3.blocks.2.token_mixer.attention_bias_idxs"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return small(seed=1).state_dict()


@pytest.fixture(scope="module")
def other() -> dict[str, Tensor]:
    return small(seed=2).state_dict()


@pytest.fixture
def network() -> Any:
    return small(seed=3)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "path", ["net", "params", "weights", "model_state", "ema.module", "checkpoint.model.weights", "module"]
)
def test_any_entry_may_hold_the_weights(state: dict[str, Tensor], network: Any, path: str) -> None:
    content: Any = state
    for name in reversed(path.split(".")):
        content = {name: content, "epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
    report = load_checkpoint(network, content)
    assert (report.container, report.prefix, report.ignored) == (path, "", ())
    assert_loaded(network, state)


@pytest.mark.parametrize(
    "prefix", ["model.", "net.", "encoder.", "image_encoder.trunk.", "model.backbone.module.", "module.visual.", "0."]
)
@pytest.mark.parametrize("naming", ["timm", "original"])
def test_any_prefix(state: dict[str, Tensor], network: Any, prefix: str, naming: str) -> None:
    beside = {"criterion.weight": torch.ones(3), "neck.0.weight": torch.ones(1)}
    report = load_checkpoint(network, beside | prefixed(prefix, convert_state_dict(state, naming)))
    assert (report.format, report.prefix, report.ignored) == (naming, prefix, tuple(beside))
    assert_loaded(network, state)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_wrappers_of_single_modules(state: dict[str, Tensor], network: Any, wrapper: str) -> None:
    wrapped = {key.replace("blocks.0.", f"blocks.0.{wrapper}"): value for key, value in state.items()}
    assert wrapped.keys() != state.keys()
    load_checkpoint(network, prefixed(wrapper, wrapped))
    assert_loaded(network, state)
    with pytest.raises(CheckpointError, match=r"norm.weight.*another key of the checkpoint"):
        load_checkpoint(network, state | {f"{wrapper}norm.weight": torch.zeros(448)})


def test_records_beside_bare_weights(state: dict[str, Tensor], network: Any) -> None:
    report = load_checkpoint(network, {**state, "epoch": 3, "best": 0.8, "config": {"lr": 1}})
    assert report.ignored == ("epoch", "best")  # `config` is an entry of its own
    assert_loaded(network, state)


# --- several sets of weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("averaged", ["model_ema", "ema_state_dict", "params_ema", "ema.module", "swa_model", "avg"])
def test_averaged_weights_come_first(
    state: dict[str, Tensor], other: dict[str, Tensor], network: Any, averaged: str
) -> None:
    content: Any = other
    for name in reversed(averaged.split(".")):
        content = {name: content}
    report = load_checkpoint(network, {"model": state, **content})
    assert (report.container, report.others) == (averaged, ("model",))
    assert_loaded(network, other)


def test_else_the_first_is_taken(state: dict[str, Tensor], other: dict[str, Tensor], network: Any) -> None:
    report = load_checkpoint(network, {"schema": 1, "student": state, "teacher": other})  # "schema" has an "ema" in it
    assert (report.container, report.others) == ("student", ("teacher",))
    assert_loaded(network, state)
    both = prefixed("schema.", other) | prefixed("model.", state)
    assert load_checkpoint(network, both).prefix == "schema."


@pytest.mark.parametrize("which", ["teacher", "teacher.backbone", "weights.teacher.backbone"])
def test_which_names_an_entry_or_a_prefix(
    state: dict[str, Tensor], other: dict[str, Tensor], network: Any, which: str
) -> None:
    content = {"weights": prefixed("student.backbone.", state) | prefixed("teacher.backbone.", other)}
    report = load_checkpoint(network, content, which=which)
    assert (report.container, report.prefix) == ("weights", "teacher.backbone.")
    assert set(report.ignored) == set(prefixed("student.backbone.", state))
    assert_loaded(network, other)


def test_a_network_within_the_other_ones_names(
    state: dict[str, Tensor], other: dict[str, Tensor], network: Any
) -> None:
    content = state | prefixed("teacher.", other)
    load_checkpoint(network, content)
    assert_loaded(network, state)
    load_checkpoint(network, content, which="teacher")
    assert_loaded(network, other)


def test_which_must_be_there(state: dict[str, Tensor], network: Any) -> None:
    with pytest.raises(CheckpointError, match=r"which: got 'model_ema', allowed are 'model', 'student'"):
        load_checkpoint(network, {"model": state, "student": state}, which="model_ema")


def test_misfits_name_the_other_weights(state: dict[str, Tensor], network: Any) -> None:
    broken = {key: value for key, value in state.items() if key != "norm.weight"}
    with pytest.raises(CheckpointError, match=r"norm.weight[\s\S]*'model_ema' was taken; which= takes one of 'model'"):
        load_checkpoint(network, {"model": state, "model_ema": broken})


def test_an_optimizer_is_no_network(state: dict[str, Tensor]) -> None:
    assert [one.name for one in find_weights({"optimizer": {"exp_avg": state}, "model": state})] == ["model"]


# --- derived buffers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.uint8])
def test_derived_buffers_in_another_dtype(state: dict[str, Tensor], network: Any, dtype: torch.dtype) -> None:
    derived = ("attention_bias_idxs", "num_batches_tracked")
    cast = {key: value.to(dtype) if key.endswith(derived) else value for key, value in state.items()}
    report = load_checkpoint(network, cast)
    assert any(remark.startswith(INDEX) for remark in report.recomputed)
    assert any(remark.startswith("num_batches_tracked of ") for remark in report.recomputed)
    assert_loaded(network, state)
    assert network.state_dict()[INDEX].dtype == torch.int64


@pytest.mark.parametrize("decay", [0.5, 0.9999, 0.99999])
@pytest.mark.parametrize("resolution", [7, 16])
def test_an_index_that_averaging_rounded(decay: float, resolution: int) -> None:
    network = small(table_resolution=resolution)
    state = network.state_dict()
    index = state[INDEX].clone()
    for _ in range(50):  # as timm's ModelEmaV2
        index.copy_(index * decay + (1.0 - decay) * state[INDEX])
    assert not torch.equal(index, state[INDEX]) or decay == 0.5
    averaged = state | {INDEX: index}
    load_checkpoint(network, averaged)
    assert torch.equal(network.state_dict()[INDEX], state[INDEX])
    network.load_state_dict(averaged)
    assert torch.equal(network.state_dict()[INDEX], state[INDEX])


def test_counters_that_are_no_numbers(state: dict[str, Tensor], network: Any) -> None:
    key = "stem.norm1.num_batches_tracked"
    for value, expected in ((torch.tensor(float("nan")), 0), (torch.tensor([7]), 7), (torch.tensor(3.75), 4)):
        assert load_checkpoint(network, state | {key: value}).recomputed
        assert network.state_dict()[key] == expected


def test_the_index_of_another_network(state: dict[str, Tensor], network: Any) -> None:
    index = state[INDEX]
    for wrong in (index.flip(0), index.T.flip(0), index + 1, torch.zeros_like(index)):
        with pytest.raises(CheckpointError, match="not the standard index"):
            load_checkpoint(network, state | {INDEX: wrong})


# --- one head ---------------------------------------------------------------------------------------------------------


def test_one_head_under_two_names(state: dict[str, Tensor]) -> None:
    network = small()
    network.head_dist = network.head
    single = {key: value for key, value in state.items() if not key.startswith("head_dist")}
    load_checkpoint(network, single)
    assert torch.equal(network.head.weight, state["head.weight"])
    with pytest.raises(CheckpointError, match="the network has one head, and the checkpoint two that differ"):
        load_checkpoint(network, state)
    with pytest.raises(CheckpointError, match="one head: model.head_dist = model.head makes"):
        load_checkpoint(small(), single)
