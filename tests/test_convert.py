"""Checkpoints in the namings of the public implementations: loading them, and converting them into another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import NETSPRESSO_L1
from l1_networks import DENSE, assert_loaded, fresh
from test_golden import checkpoint

from effformer import build_backbone, load_checkpoint
from effformer.checkpoints.formats import CheckpointError, convert_state_dict, normalise
from effformer.reference import bias_index
from effformer.testing import randomise

INDEX = "encoder.blocks.6.4.token_mixer.attention_bias_idxs"


# --- the original's dense variant -------------------------------------------------------------------------------------


def test_dense_original_resets_the_final_norm_and_drops_what_is_dead() -> None:
    state = checkpoint("snap_l1_dense_256x320")
    prefix = "network.6.4.token_mixer."
    state |= {
        prefix + "attention_bias_idxs": torch.ones(49, 49, dtype=torch.int64),
        prefix + "attention_bias_idxs_seg": bias_index(16, 16),
    }
    network = randomise(fresh(**DENSE))
    report = load_checkpoint(network, state)
    assert report.format == "original-dense"
    assert set(report.ignored) == {prefix + "attention_biases", prefix + "attention_bias_idxs"}
    assert set(report.reinitialised) == {"norm.weight", "norm.bias"}
    assert torch.equal(network.norm.weight, torch.ones(448))
    with pytest.raises(CheckpointError, match="standard index"):
        load_checkpoint(network, state | {prefix + "attention_bias_idxs_seg": bias_index(16, 16).T.flip(0)})


def test_dense_original_into_a_network_without_a_final_norm() -> None:
    network = fresh(**DENSE)
    network.prune_intermediate_layers(4, prune_norm=True)
    assert load_checkpoint(network, checkpoint("snap_l1_dense_256x320")).reinitialised == ()


def test_the_originals_classification_code_with_feature_norms() -> None:
    """models/efficientformer.py with fork_feat: norms, but no second table; its first one lives."""
    state = checkpoint("snap_l1_classification_224")
    state = {key: value for key, value in state.items() if not key.startswith(("norm.", "head", "dist_head"))}
    for name, width in (("norm0", 48), ("norm2", 96), ("norm4", 224), ("norm6", 448)):
        state |= {f"{name}.weight": torch.rand(width), f"{name}.bias": torch.rand(width)}
    network = fresh(num_classes=0, feature_norm="tap")
    assert load_checkpoint(network, state).ignored == ()
    table = network.stages[3].blocks[4].token_mixer.attention_biases
    assert torch.equal(table, state["network.6.4.token_mixer.attention_biases"].float())


# --- NetsPresso -------------------------------------------------------------------------------------------------------


def test_netspresso_qkv_is_interleaved_head_by_head() -> None:
    state = checkpoint("netspresso_l1_classification_224")
    qkv = normalise(state).state["stages.3.blocks.4.token_mixer.qkv.weight"]
    theirs = "encoder.blocks.6.4.token_mixer."
    for head in range(8):
        rows = qkv[head * 192 : (head + 1) * 192]
        assert torch.equal(rows[:32], state[theirs + "query.weight"][head * 32 : (head + 1) * 32])
        assert torch.equal(rows[32:64], state[theirs + "key.weight"][head * 32 : (head + 1) * 32])
        assert torch.equal(rows[64:], state[theirs + "value.weight"][head * 128 : (head + 1) * 128])


@torch.no_grad()
def test_netspresso_index_decides_the_bias() -> None:
    state = checkpoint("netspresso_l1_classification_224")
    backbone = build_backbone(NETSPRESSO_L1, dtype=torch.float64).eval()
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    load_checkpoint(backbone, state)
    standard = backbone(x)["last_feature"]
    load_checkpoint(backbone, state | {INDEX: bias_index(7, 7)})
    assert torch.equal(backbone(x)["last_feature"], standard)

    constant = torch.ones(49, 49, dtype=torch.int64)
    with pytest.warns(UserWarning, match="attention_bias_idxs is constant"):
        load_checkpoint(backbone, state | {INDEX: constant})
    got = backbone(x)["last_feature"]
    mixer = backbone.network.stages[3].blocks[4].token_mixer
    assert not mixer.attention_biases.any()
    assert (got - standard).abs().max() > 1e-3
    # The trainer computes one number for each head, the same at every offset.
    mixer.attention_biases.copy_(state[INDEX.replace("_bias_idxs", "_biases")][:, 1:2].expand(8, 49))
    assert torch.allclose(backbone(x)["last_feature"], got, rtol=0, atol=1e-12)

    for wrong in (bias_index(7, 7).flip(0), torch.zeros(49, 49, dtype=torch.int64).fill_diagonal_(1)):
        with pytest.raises(CheckpointError, match="not the standard index"):
            load_checkpoint(backbone, state | {INDEX: wrong})


def test_the_constant_index_rule_is_netspressos_alone() -> None:
    state = checkpoint("snap_l1_classification_224")
    key = "network.6.4.token_mixer.attention_bias_idxs"
    with pytest.raises(CheckpointError, match="not the standard index"):
        load_checkpoint(fresh(), state | {key: torch.ones(49, 49, dtype=torch.int64)})


def test_a_whole_trainer_model_carries_the_backbone() -> None:
    state = checkpoint("netspresso_l1_classification_224")
    whole = {f"backbone.{key}": value for key, value in state.items()}
    whole |= {"head.classifier.0.weight": torch.zeros(10, 448), "head.classifier.0.bias": torch.zeros(10)}
    backbone = build_backbone(NETSPRESSO_L1)
    report = load_checkpoint(backbone, whole)
    assert report.ignored == ("head.classifier.0.weight", "head.classifier.0.bias")
    assert_loaded(backbone.network, normalise(state).state)


def test_netspresso_parts_that_do_not_belong_together() -> None:
    state = checkpoint("netspresso_l1_classification_224")
    key = "encoder.blocks.6.4.token_mixer.key.bias"
    with pytest.raises(CheckpointError, match=f"cannot be joined without {key}"):
        load_checkpoint(build_backbone(NETSPRESSO_L1), {k: v for k, v in state.items() if k != key})
    with pytest.raises(CheckpointError, match="do not divide into 8 heads"):
        load_checkpoint(build_backbone(NETSPRESSO_L1), state | {key: torch.zeros(255)})


def test_netspresso_prelu_weights_find_their_module() -> None:
    source = {**NETSPRESSO_L1, "params": {**NETSPRESSO_L1["params"], "ffn_act_type": "prelu"}}
    state = checkpoint("netspresso_l1_classification_224")
    for number, (stage, count) in enumerate(((0, 3), (2, 2), (4, 6), (6, 3)), 1):
        for block in range(count):
            key = f"encoder.blocks.{stage}.{block}.channel_mlp.ffn.conv_1x1_1.block.act.weight"
            state[key] = torch.full((1,), number / 10, dtype=torch.float64)
    state["encoder.blocks.6.4.channel_mlp.ffn.act.weight"] = torch.full((1,), 0.9, dtype=torch.float64)
    network = build_backbone(source, dtype=torch.float64).network
    load_checkpoint(network, state)
    assert network.stages[2].blocks[5].mlp.act.weight.item() == 0.3
    assert network.stages[3].blocks[4].mlp.act.weight.item() == 0.9


def test_a_backbones_own_state_dict_loads_back() -> None:
    backbone = randomise(build_backbone(NETSPRESSO_L1, task="segmentation"))
    other = build_backbone(NETSPRESSO_L1, task="segmentation")
    assert load_checkpoint(other, backbone.state_dict()).format == "timm"
    assert_loaded(other, backbone.state_dict())


# --- conversion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["snap_l1_classification_224", "snap_l3_classification_224", "snap_l1_dense_256x320"])
def test_round_trip_through_our_naming(name: str) -> None:
    state = checkpoint(name)
    back = convert_state_dict(convert_state_dict(state, "effformer"), "original")
    dead = {key for key in state if name.endswith("256x320") and key.endswith("attention_biases")}
    for key, value in state.items():
        assert (back[key].shape, back[key].dtype) == (value.shape, value.dtype)
        assert key in dead or torch.equal(back[key], value), key
    import seeded
    from test_golden import GOLDEN

    manifest = seeded.load_manifest(GOLDEN / f"{name}.json")
    derived = {key for key in manifest if key.endswith("num_batches_tracked")}
    assert back.keys() == manifest.keys() - derived
    assert all(list(back[key].shape) == manifest[key] for key in back)


def test_conversion_to_timm_is_complete(timm: Any) -> None:
    for name in ("snap_l1_classification_224", "netspresso_l1_classification_224"):
        converted = convert_state_dict(checkpoint(name), "timm")
        num_classes = 1000 if name.startswith("snap") else 0
        timm.create_model("efficientformer_l1", num_classes=num_classes).load_state_dict(converted, strict=True)
    with pytest.raises(CheckpointError, match="no feature norms"):
        convert_state_dict(checkpoint("snap_l1_dense_256x320"), "timm")
    with pytest.raises(CheckpointError, match="NetsPresso's do"):  # another network under the same names
        convert_state_dict(checkpoint("netspresso_l1_segmentation_256x320"), "original")
    with pytest.raises(ValueError, match="to: got 'keras'"):
        convert_state_dict(checkpoint("snap_l1_classification_224"), "keras")
