"""Checkpoints in NetsPresso Trainer's naming: the inverse of reading them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import seeded
import torch
from command_line import run
from conftest import NETSPRESSO_L1
from l1_networks import fresh
from test_golden import GOLDEN, checkpoint

from effformer import build_backbone, create_model, load_checkpoint
from effformer.checkpoints.formats import CheckpointError, convert_state_dict, normalise
from effformer.checkpoints.to_netspresso import without_place
from effformer.testing import randomise

HEADS = ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"]


@pytest.mark.parametrize("name", ["netspresso_l1_classification_224", "netspresso_l1_segmentation_256x320"])
@pytest.mark.parametrize("through", ["effformer", "timm"])
def test_round_trip(name: str, through: str) -> None:
    state, manifest = checkpoint(name), seeded.load_manifest(GOLDEN / f"{name}.json")
    if through == "timm" and "segmentation" in name:
        return  # timm has no feature norms
    back = convert_state_dict(convert_state_dict(state, through), "netspresso")
    for key, value in state.items():
        assert back[key].dtype == value.dtype
        assert torch.equal(back[key], value), key
    assert back.keys() == {key for key in manifest if not key.endswith("num_batches_tracked")}
    assert all(list(back[key].shape) == manifest[key] for key in back)


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_the_trainers_own_network_has_these_keys(task: str) -> None:
    """Every parameter and buffer, counters of batches among them, of a network with other sizes than L1's heads."""
    params = {**NETSPRESSO_L1["params"], "num_attention_heads": 4, "attention_value_expansion_ratio": 2, "vit_num": 2}
    source = randomise(build_backbone({**NETSPRESSO_L1, "params": params | {"ffn_act_type": "prelu"}}, task=task))
    state = convert_state_dict(source.network.state_dict(), "netspresso")
    assert len(state) == len(source.network.state_dict()) + 2 * 4  # query, key, value instead of qkv
    assert "encoder.blocks.6.3.channel_mlp.ffn.conv_1x1_1.block.act.weight" not in state
    assert "encoder.blocks.6.1.channel_mlp.ffn.conv_1x1_1.block.act.weight" in state
    assert "encoder.blocks.6.3.channel_mlp.ffn.act.weight" in state
    again = normalise(state)
    assert again.format == "netspresso"
    assert again.state.keys() == source.network.state_dict().keys()
    assert all(torch.equal(again.state[key], value) for key, value in source.network.state_dict().items())


@torch.no_grad()
def test_an_original_checkpoint_computes_the_same_in_the_trainer() -> None:
    state = checkpoint("snap_l1_classification_224")
    network = create_model("efficientformer_l1", dtype=torch.float64).eval()
    load_checkpoint(network, state)
    backbone = build_backbone(NETSPRESSO_L1, dtype=torch.float64).eval()
    load_checkpoint(backbone, convert_state_dict(state, "netspresso"))
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    wanted = network.forward_head(network.forward_features(x), pre_logits=True)
    assert torch.equal(backbone(x)["last_feature"], wanted)
    assert without_place(normalise(state)) == HEADS


def test_refusals() -> None:
    with pytest.raises(CheckpointError, match="the original's do not: allowed are effformer and original"):
        convert_state_dict(checkpoint("snap_l1_dense_256x320"), "netspresso")
    with pytest.raises(CheckpointError, match=r"token_mixer\.attention_biases: got 256 offsets, allowed .* are 49"):
        convert_state_dict(fresh(table_resolution=16).state_dict(), "netspresso")
    state = fresh().state_dict()
    del state["stages.3.blocks.4.token_mixer.qkv.bias"]
    with pytest.raises(CheckpointError, match=r"cannot be separated without qkv\.bias"):
        convert_state_dict(state, "netspresso")


def test_the_command_lists_the_heads_that_it_leaves_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.save(randomise(fresh(num_classes=5)).state_dict(), tmp_path / "timm.pth")
    status, out, _ = run(capsys, "convert", tmp_path / "timm.pth", tmp_path / "theirs.pth", "--to", "netspresso")
    assert status == 0
    assert [line.removeprefix("  left out: ") for line in out.splitlines()[1:]] == sorted(HEADS, key=HEADS.index)
    written = torch.load(tmp_path / "theirs.pth", weights_only=True)
    assert load_checkpoint(build_backbone(NETSPRESSO_L1), written).format == "netspresso"
    arguments = ("convert", tmp_path / "timm.pth", tmp_path / "theirs.safetensors", "--to", "netspresso", "--json")
    status, out, _ = run(capsys, *arguments)
    assert json.loads(out)["left_out"] == HEADS
    assert json.loads(out)["tensors"] == len(written)
