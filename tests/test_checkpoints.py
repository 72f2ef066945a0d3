"""Checkpoint files: reading them, telling networks apart, refusing what does not fit."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from l1_networks import DENSE, assert_loaded, fresh
from test_golden import checkpoint
from torch import Tensor, nn

import effformer
from effformer import create_model, load_checkpoint
from effformer.checkpoints import hub
from effformer.checkpoints.formats import CheckpointError, convert_state_dict
from effformer.checkpoints.load import network_of, settings_for
from effformer.testing import randomise


@pytest.fixture(scope="module")
def l1() -> dict[str, Tensor]:
    """A complete checkpoint in timm's naming, float32."""
    return randomise(create_model("efficientformer_l1")).state_dict()


# --- files and containers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", [None, "model", "state_dict", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_containers_and_prefixes(tmp_path: Path, l1: dict[str, Tensor], container: str | None, prefix: str) -> None:
    state: Any = {prefix + key: value for key, value in l1.items()}
    path = tmp_path / "checkpoint.pth"
    torch.save({container: state, "epoch": 3, "args": argparse.Namespace(lr=0.1)} if container else state, path)
    network = fresh()
    report = load_checkpoint(network, path)
    assert (report.format, report.container) == ("timm", container)
    assert_loaded(network, l1)


def test_averaged_weights_are_preferred(l1: dict[str, Tensor]) -> None:
    averaged = {key: value + 1 if value.is_floating_point() else value for key, value in l1.items()}
    network = fresh()
    assert load_checkpoint(network, {"state_dict": l1, "state_dict_ema": averaged}).container == "state_dict_ema"
    assert_loaded(network, averaged)


def test_an_empty_container_is_passed_over(l1: dict[str, Tensor]) -> None:
    assert load_checkpoint(fresh(), {"state_dict_ema": {}, "state_dict": l1}).container == "state_dict"


def test_averaged_model(l1: dict[str, Tensor]) -> None:
    average = torch.optim.swa_utils.AveragedModel(randomise(fresh(), seed=5))
    network = fresh()
    assert load_checkpoint(network, average.state_dict()).ignored == ("n_averaged",)
    assert_loaded(network, average.module.state_dict())


def test_safetensors(tmp_path: Path, l1: dict[str, Tensor]) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(l1, path)
    network = fresh()
    report = load_checkpoint(network, path)
    assert_loaded(network, l1)
    assert report == effformer.checkpoints.load.CheckpointReport(format="timm")


class _Malicious:
    ran = False

    def __reduce__(self) -> Any:
        return setattr, (sys.modules[__name__]._Malicious, "ran", True)


def test_a_file_that_would_run_code_is_not_read(tmp_path: Path, l1: dict[str, Tensor]) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": l1, "epoch": _Malicious()}, path)
    with pytest.raises(CheckpointError, match="not a torch file of weights alone"):
        load_checkpoint(fresh(), path)
    assert not _Malicious.ran
    torch.load(path, weights_only=False)  # the file would have done it
    assert _Malicious.ran


@pytest.mark.parametrize(
    "content", [b"not a checkpoint", b"", b"\x80\x02u.", b"\x80\x02X\x01\x00\x00\x00\xff."], ids=range(4)
)
@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors"])
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(fresh(), tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(fresh(), tmp_path / f"absent-{name}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "at least one key"),
        ({"epoch": 1}, r"it holds no tensors.*'epoch' \(int\)"),
        ({"layer1.0.weight": torch.zeros(1)}, "no known EfficientFormer.*layer1.0.weight"),
    ],
)
def test_something_else_than_a_checkpoint(content: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(fresh(), content)


def test_something_else_than_a_network(l1: dict[str, Tensor]) -> None:
    with pytest.raises(TypeError, match="model: got Linear"):
        load_checkpoint(nn.Linear(1, 1), l1)
    with pytest.raises(ValueError, match="meta device"):
        load_checkpoint(fresh(device="meta"), l1)


def test_a_foreign_head_does_not_displace_ours(l1: dict[str, Tensor]) -> None:
    whole = {f"backbone.{key}": value for key, value in l1.items()} | {"head.weight": torch.zeros(2, 2)}
    network = fresh()
    assert load_checkpoint(network, whole).ignored == ("head.weight",)
    assert_loaded(network, l1)


# --- strictness -------------------------------------------------------------------------------------------------------


def test_every_misfit_is_listed_and_nothing_is_loaded(l1: dict[str, Tensor]) -> None:
    state = dict(l1)
    del state["stem.conv1.bias"], state["norm.weight"]
    state |= {"extra.one": torch.zeros(1), "norm.bias": torch.zeros(3), "stages.0.blocks.0.ls1.gamma": torch.zeros(2)}
    network = fresh()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(network, state)
    message = str(error.value)
    for part in (
        "mis-shaped (2)",
        "norm.bias: got [3], allowed is [448]",
        "stages.0.blocks.0.ls1.gamma: got [2], allowed is [48]",
        "missing (2)",
        "stem.conv1.bias",
        "norm.weight",
        "unexpected (1)",
        "extra.one",
    ):
        assert part in message
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_not_strict_reports_instead(l1: dict[str, Tensor]) -> None:
    state = dict(l1) | {"extra.one": torch.zeros(1)}
    del state["norm.weight"]
    network = fresh()
    report = load_checkpoint(network, state, strict=False)
    assert (report.missing, report.unexpected) == (("norm.weight",), ("extra.one",))
    assert_loaded(network, {key: value for key, value in state.items() if key != "extra.one"})
    with pytest.raises(CheckpointError, match="norm.bias: got"):  # a shape is wrong in any case
        load_checkpoint(network, state | {"norm.bias": torch.zeros(3)}, strict=False)


def test_derived_buffers_may_be_absent_but_not_wrong(l1: dict[str, Tensor]) -> None:
    lean = {k: v for k, v in l1.items() if not k.endswith(("num_batches_tracked", "attention_bias_idxs"))}
    for load in (load_checkpoint, lambda network, state: network.load_state_dict(state, strict=True)):
        network = fresh()
        load(network, lean)
        assert_loaded(network, l1)
        key = "stages.3.blocks.4.token_mixer.attention_bias_idxs"
        for wrong in (l1[key].flip(0), torch.ones(49, 49, dtype=torch.int64), l1[key][:7, :7]):
            with pytest.raises(RuntimeError, match=r"attention_bias_idxs.*standard index \|dy\| \* 7"):
                load(network, l1 | {key: wrong})


def test_casts_are_reported(l1: dict[str, Tensor]) -> None:
    half = {key: value.half() if value.is_floating_point() else value for key, value in l1.items()}
    network = fresh()
    assert load_checkpoint(network, half).cast == ("float16 -> float32",)
    assert load_checkpoint(network, l1).cast == ()
    key = "norm.weight"
    with pytest.raises(CheckpointError, match=r"norm.weight: got torch.int8, allowed is torch.float32"):
        load_checkpoint(network, l1 | {key: l1[key].to(torch.int8)})


def test_heads_of_another_size_are_drawn_anew_only_when_asked(l1: dict[str, Tensor]) -> None:
    network = fresh(num_classes=10)
    with pytest.raises(CheckpointError, match=r"head.weight: got \[1000, 448\][\s\S]*reset_head=True") as error:
        load_checkpoint(network, l1)
    assert "head_dist.bias: got [1000]" in str(error.value)
    before = network.head.weight.clone()
    report = load_checkpoint(network, l1, reset_head=True)
    assert set(report.reinitialised) == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
    assert not torch.equal(network.head.weight, before)
    assert abs(network.head.weight.std() - 0.02) < 0.003
    assert not network.head_dist.bias.any()
    assert_loaded(network, {key: value for key, value in l1.items() if not key.startswith("head")})

    same_size = fresh()  # heads that fit are loaded, asked or not
    assert load_checkpoint(same_size, l1, reset_head=True).reinitialised == ()
    assert_loaded(same_size, l1)


def test_one_head_alone_is_not_mixed_with_a_random_one(l1: dict[str, Tensor]) -> None:
    single = {key: value for key, value in l1.items() if not key.startswith("head_dist")}
    with pytest.raises(CheckpointError, match="head_dist.weight"):
        load_checkpoint(fresh(), single)
    assert len(load_checkpoint(fresh(), single, reset_head=True).reinitialised) == 4


def test_a_network_without_heads_reports_those_of_the_file(l1: dict[str, Tensor]) -> None:
    network = fresh(num_classes=0)
    report = load_checkpoint(network, l1)
    assert set(report.ignored) == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
    assert_loaded(network, {key: value for key, value in l1.items() if not key.startswith("head")})


def test_another_table_resolution_is_named(l1: dict[str, Tensor]) -> None:
    with pytest.raises(
        CheckpointError, match=r"attention_biases: got \[8, 49\], allowed is \[8, 256\][\s\S]*resolution"
    ):
        load_checkpoint(fresh(table_resolution=16), l1)


def test_another_default_device(l1: dict[str, Tensor]) -> None:
    network = fresh()
    with torch.device("meta"):
        network.load_state_dict(l1, strict=True)
        load_checkpoint(network, {k: v for k, v in l1.items() if not k.endswith("attention_bias_idxs")})
        randomise(network)
    assert_loaded(network, l1)  # randomise drew what it draws without one


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("timm_l1_features_224", {"num_classes": 1000, "table_resolution": 7}),
        (
            "netspresso_l1_segmentation_256x320",
            {"num_classes": 0, "table_resolution": 7, "bias_resize": "matrix-bilinear", "feature_norm": "inline"},
        ),
        ("snap_l1_dense_256x320", DENSE),
    ],
)
def test_settings_for_a_checkpoint(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    assert settings_for(checkpoint(name)) == ("efficientformer_l1", settings)
    torch.save({"model": checkpoint(name)}, tmp_path / "weights.pth")
    for source in (checkpoint(name), tmp_path / "weights.pth"):
        assert network_of(source) == ("efficientformer_l1", settings)
    load_checkpoint(create_model("efficientformer_l1", **settings), checkpoint(name))


def test_settings_are_not_guessed(l1: dict[str, Tensor]) -> None:
    assert settings_for(checkpoint("snap_l3_classification_224"))[0] == "efficientformer_l3"
    single = {key: value for key, value in l1.items() if not key.startswith("head_dist")}
    assert settings_for(single)[1]["num_classes"] == 0
    for name in ("netspresso_l1_segmentation_256x320", "snap_l1_dense_256x320"):
        with pytest.raises(CheckpointError, match="does not say whether its feature norms are tapped or inline"):
            settings_for(convert_state_dict(checkpoint(name), "effformer"))
    with pytest.raises(CheckpointError, match=r"widths \(48, 96, 224, 64\)"):
        settings_for(l1 | {"stages.3.downsample.conv.weight": torch.zeros(64, 224, 3, 3)})


# --- by name ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path, l1: dict[str, Tensor]) -> Path:
    """A folder as timm's repositories on the hub are."""
    folder = tmp_path / "efficientformer_l1"
    folder.mkdir()
    safetensors.torch.save_file(l1, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": {"crop_pct": 0.9}}))
    return folder


def test_create_model_loads_a_folder_and_a_file(repository: Path, l1: dict[str, Tensor]) -> None:
    for checkpoint_path in (repository, repository / "model.safetensors"):
        assert_loaded(create_model("efficientformer_l1", checkpoint=str(checkpoint_path)), l1)
    with pytest.raises(CheckpointError, match="reset_head=True"):
        create_model("efficientformer_l1", checkpoint=str(repository), num_classes=3)
    network = create_model("efficientformer_l1", checkpoint=str(repository), num_classes=3, reset_head=True)
    assert network.head.weight.shape == (3, 448)
    assert hub.read_config(repository) == {"pretrained_cfg": {"crop_pct": 0.9}}


def test_pretrained_comes_from_the_hub(
    repository: Path, tmp_path: Path, l1: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub itself, offline, over a cache that holds timm's repository."""
    constants = pytest.importorskip("huggingface_hub.constants")
    cache = tmp_path / "cache" / "models--timm--efficientformer_l1.snap_dist_in1k"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    (cache / "snapshots").mkdir()
    (cache / "snapshots" / ("0" * 40)).symlink_to(repository)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert_loaded(create_model("efficientformer_l1", pretrained=True), l1)
    for name in ("timm/efficientformer_l1.snap_dist_in1k", "hf-hub:timm/efficientformer_l1.snap_dist_in1k@main"):
        assert_loaded(create_model("efficientformer_l1", checkpoint=name), l1)
        assert hub.read_config(name)["pretrained_cfg"] == {"crop_pct": 0.9}
    with pytest.raises(OSError, match="(?i)hub|cache|offline"):
        create_model("efficientformer_l3", pretrained=True)


def test_checkpoints_that_are_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="has none of model.safetensors"):
        hub.locate(tmp_path)
    for name in ("no/such/place", "weights.pth", "models/weights.pth"):
        with pytest.raises(FileNotFoundError, match="not a file, a folder or a hub id"):
            hub.locate(name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match='pip install "huggingface_hub>='):
        hub.locate("timm/efficientformer_l1.snap_dist_in1k")
