"""Weights in the files of many trainers: entries, prefixes, several sets of weights, damaged derived buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from l1_networks import assert_loaded
from small_networks import small
from torch import Tensor, nn

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


@pytest.mark.parametrize(
    "averaged", ["model_ema", "ema_state_dict", "params_ema", "ema.module", "swa_model", "avg", "modelEMA"]
)
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


def test_an_exact_name_comes_first(state: dict[str, Tensor], other: dict[str, Tensor], network: Any) -> None:
    content = {"ema": {"model": other}, "model": state, "old": {"model": other}}
    assert load_checkpoint(network, content).container == "ema.model"
    assert load_checkpoint(network, content, which="model").container == "model"
    assert_loaded(network, state)
    assert load_checkpoint(network, content, which="old").container == "old.model"


def test_mmengine_saves_its_average_as_the_model(
    state: dict[str, Tensor], other: dict[str, Tensor], network: Any
) -> None:
    content = {
        "ema_state_dict": {"steps": torch.tensor(3)} | prefixed("module.backbone.", other),
        "state_dict": prefixed("backbone.", state),
        "message_hub": {},
    }
    assert load_checkpoint(network, content).container == "state_dict"
    assert_loaded(network, state)
    load_checkpoint(network, content, which="ema_state_dict")
    assert_loaded(network, other)


def test_modules_lists_and_arrays(state: dict[str, Tensor], network: Any) -> None:
    arrays = {key: value.numpy() for key, value in state.items()}
    for content, container in (
        (small(seed=1), None), ({"ema": small(seed=1)}, "ema"), ({"models": [{}, state]}, "models.1"),
        ((state, 3), "0"), ({"model": arrays}, "model"),
    ):  # fmt: skip
        network.load_state_dict(small(seed=3).state_dict())
        source = content if not isinstance(content, tuple) else {"0": content[0], "1": content[1]}
        assert load_checkpoint(network, source).container == container
        assert_loaded(network, state)


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


# --- networks and weights that tools changed --------------------------------------------------------------------------


def test_a_network_whose_parts_are_wrapped(state: dict[str, Tensor], network: Any) -> None:
    network.stages[0] = torch.compile(network.stages[0])
    for source in (state, network.state_dict() | {"stages.0._orig_mod.blocks.0.ls1.gamma": torch.zeros(48)}):
        load_checkpoint(network, source)
    assert not network.stages[0].blocks[0].ls1.gamma.any()


def test_changed_parts_of_a_network_are_named(state: dict[str, Tensor], network: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(network.head)
    with pytest.raises(CheckpointError, match=r"the network's head is a .*remove_parametrizations"):
        load_checkpoint(network, state)


def test_a_frozen_norm_has_no_counter(state: dict[str, Tensor], network: Any) -> None:
    network.stem.norm1 = FrozenBatchNorm2d(24)
    assert load_checkpoint(network, state).ignored == ("stem.norm1.num_batches_tracked",)
    network.head_dist = None
    with pytest.raises(ValueError, match="head, head_dist: got None"):
        network.logits(torch.zeros(1, 448))
    assert set(load_checkpoint(network, state).ignored) >= {"head_dist.weight", "head_dist.bias"}


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.zeros(width))


@pytest.mark.parametrize(
    ("key", "other", "cause"),
    [
        ("head.weight", "head.weight_orig", "pruned: torch.nn.utils.prune.remove"),
        ("head.weight", "head.parametrizations.weight.original0", "parametrised"),
        ("head.weight", "head.weight_g", "remove_weight_norm"),
        ("head.weight", "head._packed_params.scale", "quantised: take the weights from before"),
        ("head.weight", "head.lora_A.default.weight", "merge_and_unload"),
        ("head.weight", "_fsdp_wrapped_module._flat_param", "get_model_state_dict"),
    ],
)
def test_weights_that_tools_changed(state: dict[str, Tensor], network: Any, key: str, other: str, cause: str) -> None:
    changed = {other if name == key else name: value for name, value in state.items()}
    with pytest.raises(CheckpointError, match=cause):
        load_checkpoint(network, changed)
    with pytest.raises(CheckpointError, match=cause):
        load_checkpoint(network, {other: state[key]})  # alone


def test_tensors_without_data(state: dict[str, Tensor], network: Any) -> None:
    empty = {name: torch.empty(0) for name in state}
    with pytest.raises(CheckpointError, match="ZeRO-3 leaves it: zero_to_fp32.py"):
        load_checkpoint(network, empty)
    with pytest.raises(CheckpointError, match="on the meta device"):
        load_checkpoint(network, {name: value.to("meta") for name, value in state.items()})


@pytest.mark.parametrize(
    ("key", "naming"),
    [("backbone.patch_embed.0.conv.weight", "MMPretrain"), ("patch_embed.convolution1.weight", "transformers")],
)
def test_other_namings_are_named(network: Any, key: str, naming: str) -> None:
    with pytest.raises(CheckpointError, match=f"in the naming of {naming}, which is not read"):
        load_checkpoint(network, {"state_dict": {key: torch.zeros(24, 3, 3, 3)}})


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
