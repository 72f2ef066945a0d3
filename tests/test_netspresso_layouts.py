"""Backbones in the layouts of NetsPresso Trainer before 0.1: read where 0.1 can express them, refused elsewhere."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from effformer import build_backbone
from effformer.config import ConfigError, EfficientFormerConfig
from effformer.model.netspresso_file import read_netspresso

# As config/model/efficientformer/efficientformer-l1-classification.yaml of 0.0.8 has it, with other values.
FLAT = """
model:
  task: segmentation
  checkpoint: ./weights/efficientformer/efficientformer_l1_1000d.pth
  fx_model_checkpoint: ~
  architecture:
    full: ~ # auto
    backbone:
      name: efficientformer
      num_blocks: [1, 2, 3, 4]
      hidden_sizes: [16, 24, 32, 40]
      num_attention_heads: 4
      attention_hidden_size: 64  # attention_hidden_size_splitted * num_attention_heads
      attention_dropout_prob: 1e-1
      attention_ratio: 3
      attention_bias_resolution: 16
      pool_size: 3
      intermediate_ratio: 2
      hidden_dropout_prob: 0.2
      hidden_activation_type: 'silu'
      layer_norm_eps: 1e-5
      drop_path_rate: 0.
      use_layer_scale: True
      layer_scale_init_value: 1e-5
      downsamples: [True, True, True, True]
      down_patch_size: 3
      down_stride: 2
      down_pad: 1
      vit_num: 2
    head: {name: fc}
"""
CONFIG = EfficientFormerConfig(
    depths=(1, 2, 3, 4), widths=(16, 24, 32, 40), num_vit=2, num_heads=4, key_dim=16, value_ratio=3, mlp_ratio=2,
    act="silu", attn_drop=0.1, proj_drop=0.2, bias_resize="matrix-bilinear",
)  # fmt: skip
COLUMNS = ("num_blocks", "hidden_sizes", "downsamples")


def flat(**changes: Any) -> dict[str, Any]:
    """The backbone of `FLAT`, with changes; `...` takes a field out."""
    content = yaml.safe_load(FLAT.replace("1e-", "1.0e-"))
    fields = content["model"]["architecture"]["backbone"] | changes
    return {key: value for key, value in fields.items() if value is not ...}


def nested(**changes: Any) -> dict[str, Any]:
    """As 0.0.10 wrote it."""
    fields = flat(**changes)
    stages = [{key: fields[key][i] for key in COLUMNS if key in fields} for i in range(4)]
    params = {key: value for key, value in fields.items() if key not in ("name", *COLUMNS)}
    return {"name": "efficientformer", "params": params, "stage_params": stages}


def read_old(source: Any) -> EfficientFormerConfig:
    with pytest.warns(UserWarning, match='before 0.1(?s:.*)bias_resize="matrix-bicubic"'):
        return read_netspresso(source).config


def problems(backbone: Any) -> tuple[str, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a refusal says enough
        with pytest.raises(ConfigError) as error:
            read_netspresso(backbone)
    return error.value.problems


@pytest.mark.parametrize("layout", [flat, nested])
def test_every_field_of_both_layouts(layout: Any) -> None:
    backbone = layout()
    before = copy.deepcopy(backbone)
    assert read_old({"backbone": backbone}) == CONFIG
    assert backbone == before


def test_a_whole_file_builds_a_network_and_warns_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(FLAT)
    with pytest.warns(UserWarning, match="old.yaml has a layout of NetsPresso Trainer before 0.1") as caught:
        backbone = build_backbone(path)
    assert caught[0].filename == __file__
    assert (backbone.task, backbone.intermediate_features_dim) == ("segmentation", [16, 24, 32, 40])


def test_names_in_between_and_fields_that_are_constants_now() -> None:
    backbone = nested(attention_bias_resolution=7)
    backbone["params"]["ffn_act_type"] = backbone["params"].pop("hidden_activation_type")
    for stage in backbone["stage_params"]:
        stage["channels"] = stage.pop("hidden_sizes")
    assert read_old(backbone) == CONFIG
    new = {
        "attention_hidden_size": "attention_channels",
        "attention_ratio": "attention_value_expansion_ratio",
        "intermediate_ratio": "ffn_intermediate_ratio",
        "hidden_dropout_prob": "ffn_dropout_prob",
    }
    backbone["params"] = {new.get(key, key): value for key, value in backbone["params"].items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_netspresso(backbone).config == CONFIG  # pool_size and the like stand there still


def test_defaults_of_the_flat_layout() -> None:
    fields = ("vit_num", "drop_path_rate", "use_layer_scale", "layer_scale_init_value", "downsamples", "down_pad")
    assert read_old(flat(**dict.fromkeys(fields, ...))).num_vit == 1
    assert problems(nested(vit_num=...)) == ("params.vit_num: missing",)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("pool_size", 5, "got 5 (int), allowed is 3, a constant since 0.1 of NetsPresso Trainer"),
        ("layer_norm_eps", 1e-6, "got 1e-06 (float), allowed is 1e-05, a constant since 0.1"),
        ("drop_path_rate", 0.1, "got 0.1 (float), allowed is 0, a constant since 0.1"),
        ("use_layer_scale", False, "got False (bool), allowed is True, a constant since 0.1"),
        ("layer_scale_init_value", "1e-5", "got '1e-5' (str), allowed is 1e-05, a constant since 0.1"),
        ("down_patch_size", 2, "got 2 (int), allowed is 3"),
        ("down_stride", [2], "got [2] (list), allowed is 2"),
        ("down_pad", 0, "got 0 (int), allowed is 1"),
        ("attention_bias_resolution", 0, "got 0 (int), allowed is an integer of 1 or more"),
        ("attention_ratio", -1, "got -1 (int), allowed is a number above 0"),
        ("attention_hidden_size", 66, "got 66 (int), allowed is a multiple of 4 heads"),
        ("hidden_activation_type", "mish", "got 'mish' (str), allowed is one of gelu"),
        ("num_attention_heads", 0, "got 0 (int), allowed is an integer of 1 or more"),
        ("vit_num", 5, "got 5 (int), allowed is at most the 4 blocks of the last stage"),
        ("intermediate_ratio", ..., "missing"),
        ("num_attention_heads", ..., "missing"),
        ("attention_rate", 4, "unknown key"),
    ],
)
def test_a_wrong_field_is_named_as_the_file_names_it(field: str, value: Any, expected: str) -> None:
    (line,) = problems(flat(**{field: value}))
    assert line.startswith(f"{field}: {expected}")
    (line,) = problems({"model": {"architecture": {"backbone": nested(**{field: value})}}})
    name = "ffn_intermediate_ratio" if field == "intermediate_ratio" and value is ... else field
    assert line.startswith(f"model.architecture.backbone.params.{name}: {expected}")


def test_wrong_stages_are_named_as_the_file_names_them() -> None:
    assert problems(flat(num_blocks=[1, 2, 3], hidden_sizes=...)) == (
        "num_blocks: got [1, 2, 3] (list), allowed is a list of four values, one for each stage",
        "hidden_sizes: missing",
    )
    assert problems(flat(num_blocks=[1, 0, 3, 4], hidden_sizes=[15, "24", 32, 40])) == (
        "num_blocks[1]: got 0 (int), allowed is an integer of 1 or more",
        "hidden_sizes[1]: got '24' (str), allowed is an integer of 1 or more",
        "hidden_sizes[0]: got 15 (int), allowed is an even number (the stem's first convolution has half of it)",
    )
    assert problems(nested(hidden_sizes=[16, 24, 32, 0]))[0].startswith("stage_params[3].hidden_sizes: got 0")


@pytest.mark.parametrize("layout", [flat, nested])
def test_downsampling_that_was_left_out(layout: Any) -> None:
    """Only between two stages of one width the trainer ever left it out."""
    assert read_old(layout(downsamples=[False, False, False, False])) == CONFIG
    equal = [16, 16, 32, 32]
    config = read_old(layout(hidden_sizes=equal, downsamples=[True, False, True, False]))
    assert config.widths == (16, 16, 32, 32)
    name = "downsamples[{}]" if layout is flat else "stage_params[{}].downsamples"
    allowed = "allowed is True: a downsampling follows every stage since 0.1 of NetsPresso Trainer"
    assert problems(layout(hidden_sizes=equal, downsamples=[False, 1, False, True])) == (
        f"{name.format(0)}: got False (bool), {allowed}",
        f"{name.format(1)}: got 1 (int), {allowed}",
        f"{name.format(2)}: got False (bool), {allowed}",
    )


def test_old_and_new_names_of_one_field() -> None:
    backbone = nested()
    backbone["params"]["attention_channels"] = 64
    backbone["stage_params"][2]["channels"] = 32
    assert problems(backbone) == (
        "params.attention_hidden_size: stands beside attention_channels, its name since 0.1 of NetsPresso Trainer: "
        "keep one of them",
        "stage_params[2].hidden_sizes: stands beside channels, its name since 0.1 of NetsPresso Trainer: "
        "keep one of them",
    )


def test_layouts_without_the_fields() -> None:
    """Before 0.0.7 a configuration held the backbone's name alone, at first below `train`."""
    (line,) = problems(
        {"model": {"task": "classification", "architecture": {"backbone": "efficientformer", "head": "fc"}}}
    )
    assert line == (
        "model.architecture.backbone: got 'efficientformer' (str), allowed is a mapping with name, params, stage_params: "
        "NetsPresso Trainer before 0.0.7 named it alone, later versions need its fields"
    )
    (line,) = problems({"train": {"task": "detection", "architecture": {"backbone": "efficientformer"}}})
    assert line == (
        "train.architecture: a layout of NetsPresso Trainer before 0.0.7, without the backbone's fields: write "
        "model.architecture.backbone with name, params, stage_params"
    )


def test_a_full_model_has_no_backbone() -> None:
    for full in ("pidnet", {"name": "pidnet", "m": 2}):
        (line,) = problems({"model": {"architecture": {"full": full, "backbone": flat()}}})
        assert line.startswith("model.architecture.full: got 'pidnet' (str), allowed is null")
    assert read_old({"model": {"architecture": {"full": {"name": None}, "backbone": flat()}}}) == CONFIG
