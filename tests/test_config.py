from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import NETSPRESSO_L1

from effformer import EfficientFormerConfig, build_backbone, create_model, list_models
from effformer.config import ACTIVATIONS, PRESETS, ConfigError
from effformer.model.netspresso_file import read_netspresso

TRAINER_FILE = """
model:
  task: segmentation
  name: efficientformer_l3
  checkpoint: {use_pretrained: true, path: ~}
  freeze_backbone: false
  architecture:
    full: ~
    backbone:
      name: efficientformer
      params:
        num_attention_heads: 8
        attention_channels: 256  # attention_hidden_size_splitted * num_attention_heads
        attention_dropout_prob: 0.
        attention_value_expansion_ratio: 4
        ffn_intermediate_ratio: 4
        ffn_dropout_prob: 0.
        ffn_act_type: 'gelu'
        vit_num: 4
      stage_params:
        -
          num_blocks: 4
          channels: 64
        -
          num_blocks: 4
          channels: 128
        -
          num_blocks: 12
          channels: 320
        -
          num_blocks: 6
          channels: 512
    neck: {name: fpn, params: {num_outs: 4}}
    head: {name: fully_convolutional_network}
  postprocessor: ~
  losses: [{criterion: cross_entropy, weight: ~}]
"""


def changed(path: str, value: Any) -> dict[str, Any]:
    """NETSPRESSO_L1 with the field at dotted `path` replaced, or removed where value is `...`."""
    backbone = copy.deepcopy(NETSPRESSO_L1)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    target: Any = backbone
    for part in parents:
        target = target[part]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return backbone


def test_parameter_counts() -> None:
    counts = {name: sum(p.numel() for p in create_model(name, device="meta").parameters()) for name in list_models()}
    assert counts == {
        "efficientformer_l1": 12_289_928,
        "efficientformer_l3": 31_406_000,
        "efficientformer_l7": 82_229_328,
    }


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("depths", (3, 2, 6), "four integers"),
        ("depths", (3, 2, 6, 0), "four integers"),
        ("widths", (48, 96, 224, 448.0), "four integers"),
        ("widths", (49, 96, 224, 448), "even"),
        ("num_vit", 5, "at most the 4 blocks"),
        ("num_vit", True, "an integer of 0 or more"),
        ("num_heads", 0, "an integer of 1 or more"),
        ("key_dim", 2.0, "an integer of 1 or more"),
        ("value_ratio", 0.3, "whole"),
        ("mlp_ratio", float("inf"), "a number above 0"),
        ("mlp_ratio", 0.001, "at least one hidden channel"),
        ("act", "tanh", "gelu"),
        ("attn_drop", 1.5, "from 0 to 1"),
        ("proj_drop", "0.1", "from 0 to 1"),
        ("bias_resize", "bilinear", "matrix-bilinear"),
        ("table_resolution", 0, "an integer of 1 or more"),
        ("feature_norm", "outline", "tap"),
    ],
)
def test_config_says_what_is_wrong(field: str, value: Any, allowed: str) -> None:
    fields: dict[str, Any] = {"depths": (3, 2, 6, 4), "widths": (48, 96, 224, 448), "num_vit": 1}
    with pytest.raises(ConfigError) as error:
        EfficientFormerConfig(**fields | {field: value})
    (problem,) = error.value.problems
    assert problem.startswith(field)
    assert repr(value if field != "widths" or value[0] != 49 else 49) in problem
    assert allowed in problem


def test_config_reports_every_problem_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        EfficientFormerConfig(depths=(1, 1, 1, 1), widths=(8, 8, 8, 8), num_vit=-1, act="x", key_dim=0)
    assert [problem.partition(":")[0] for problem in error.value.problems] == ["num_vit", "key_dim", "act"]


def test_config_takes_lists() -> None:
    config = EfficientFormerConfig(depths=[3, 2, 6, 4], widths=[48, 96, 224, 448], num_vit=1)  # type: ignore[arg-type]
    assert config == PRESETS["efficientformer_l1"]
    assert hash(config) == hash(PRESETS["efficientformer_l1"])


def test_yaml_examples_are_the_published_networks(tmp_path: Path) -> None:
    path = tmp_path / "l3.yaml"
    path.write_text(TRAINER_FILE)
    for source, name in (
        (path, "efficientformer_l3"),
        (str(path), "efficientformer_l3"),
        (NETSPRESSO_L1, "efficientformer_l1"),
    ):
        network = build_backbone(source, task="classification").network
        named = create_model(name, num_classes=0)
        assert {k: v.shape for k, v in network.state_dict().items()} == {
            k: v.shape for k, v in named.state_dict().items()
        }
        assert {n: type(m) for n, m in network.named_modules()} == {n: type(m) for n, m in named.named_modules()}


def test_where_the_backbone_may_stand_and_who_names_the_task(tmp_path: Path) -> None:
    whole = yaml.safe_load(TRAINER_FILE)
    before = copy.deepcopy(whole)
    assert read_netspresso(whole).task == "segmentation"
    assert whole == before
    bare = whole["model"]["architecture"]["backbone"]
    for source in ({"backbone": bare}, bare):
        assert read_netspresso(source) == (read_netspresso(whole).config, None)
    assert build_backbone(whole).task == "segmentation"
    assert build_backbone(whole, task="Detection").task == "detection"
    assert build_backbone(bare).task == "classification"
    whole["model"]["task"] = "tracking"
    assert build_backbone(whole, task="detection").task == "detection"  # the argument beats the file's in any case
    with pytest.raises(ConfigError, match="model.task: got 'tracking'"):
        build_backbone(whole)


def test_every_yaml_field_reaches_the_config() -> None:
    backbone = {
        "name": "efficientformer",
        "params": {
            "num_attention_heads": 2,
            "attention_channels": 12,
            "attention_dropout_prob": 0.1,
            "attention_value_expansion_ratio": 3,
            "ffn_intermediate_ratio": 2,
            "ffn_dropout_prob": 0.2,
            "ffn_act_type": "Hard_Swish",
            "vit_num": 2,
        },
        "stage_params": [{"num_blocks": n, "channels": c} for n, c in ((1, 8), (2, 10), (3, 12), (4, 14))],
    }
    assert read_netspresso(backbone).config == EfficientFormerConfig(
        depths=(1, 2, 3, 4),
        widths=(8, 10, 12, 14),
        num_vit=2,
        num_heads=2,
        key_dim=6,
        value_ratio=3,
        mlp_ratio=2,
        act="hard_swish",
        attn_drop=0.1,
        proj_drop=0.2,
        bias_resize="matrix-bilinear",
    )


@pytest.mark.parametrize(
    ("path", "value", "field", "expected"),
    [
        ("name", "efficientformerv2", "name", "'efficientformer'"),
        ("name", ..., "name", "missing"),
        ("params.vit_num", 5, "params.vit_num", "at most the 4 blocks"),
        ("params.vit_num", ..., "params.vit_num", "missing"),
        ("params.vit_num", "1", "params.vit_num", "got '1' (str)"),
        ("params.vit_nun", 1, "params.vit_nun", "did you mean 'vit_num'?"),
        ("params.attention_channels", 250, "params.attention_channels", "a multiple of 8 heads"),
        ("params.attention_value_expansion_ratio", 0.01, "params.attention_value_expansion_ratio", "whole"),
        ("params.attention_dropout_prob", -0.1, "params.attention_dropout_prob", "from 0 to 1"),
        ("params.ffn_dropout_prob", True, "params.ffn_dropout_prob", "from 0 to 1"),
        ("params.ffn_intermediate_ratio", 0, "params.ffn_intermediate_ratio", "above 0"),
        ("params.ffn_intermediate_ratio", 0.01, "params.ffn_intermediate_ratio", "at least one hidden channel"),
        ("params.ffn_act_type", "mish", "params.ffn_act_type", ", ".join(ACTIVATIONS)),
        ("params", [], "params", "a mapping"),
        ("stage_params", [], "stage_params", "four stages"),
        ("stage_params.2", 6, "stage_params[2]", "num_blocks, channels"),
        ("stage_params.1.channels", "96", "stage_params[1].channels", "an integer of 1 or more"),
        ("stage_params.0.channels", 49, "stage_params[0].channels", "an even number"),
        ("stage_params.3.num_block", 4, "stage_params[3].num_block", "unknown key"),
        ("stage_params.3.num_blocks", ..., "stage_params[3].num_blocks", "missing"),
    ],
)
def test_yaml_says_which_field_is_wrong(path: str, value: Any, field: str, expected: str) -> None:
    whole = {"model": {"architecture": {"backbone": changed(path, value)}}}
    with pytest.raises(ConfigError) as error:
        build_backbone(whole)
    (problem,) = error.value.problems
    assert problem.startswith(f"model.architecture.backbone.{field}:")
    assert expected in problem


def test_yaml_reports_every_problem_at_once() -> None:
    backbone = changed("params.vit_num", 9)
    backbone["params"]["ffn_act_type"] = None
    backbone["stage_params"][0] = {"num_blocks": 0, "channels": 48, "width": 1}
    with pytest.raises(ConfigError) as error:
        read_netspresso({"model": {"task": "tracking", "architecture": {"backbone": backbone}}})
    fields = {
        problem.partition(":")[0].removeprefix("model.architecture.backbone.") for problem in error.value.problems
    }
    assert fields == {
        "model.task",
        "params.vit_num",
        "params.ffn_act_type",
        "stage_params[0].num_blocks",
        "stage_params[0].width",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 2]", "top level: got [1, 2] (list), allowed is a mapping"),
        ("model: {task: classification}", "model.architecture.backbone: missing"),
        ("model: ~", "model.architecture.backbone: missing"),
        ("model: {architecture: {backbone: resnet50}}", "model.architecture.backbone: got 'resnet50'"),
    ],
)
def test_files_without_a_backbone(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "trainer.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        build_backbone(path)
    assert expected in str(error.value)
    assert str(path) in str(error.value)


def test_a_key_that_stands_twice_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "trainer.yaml"
    path.write_text(TRAINER_FILE.replace("vit_num: 4", "vit_num: 4\n        vit_num: 1"))
    with pytest.raises(yaml.YAMLError, match="'vit_num' stands twice"):
        build_backbone(path)


def test_files_that_are_odd_yaml(tmp_path: Path) -> None:
    path = tmp_path / "trainer.yaml"
    bare = yaml.safe_dump({"backbone": NETSPRESSO_L1})
    path.write_text("1: one\n'1': another\n" + bare)  # two keys; what stands beside the backbone is left alone
    assert build_backbone(path).feature_dim == 448
    path.write_text("? [a, b]\n: 1\n" + bare)
    with pytest.raises(yaml.YAMLError, match="trainer.yaml"):
        build_backbone(path)
    path.write_bytes(b"backbone: \xff")
    with pytest.raises(ConfigError, match=r"trainer.yaml(?s:.*)not UTF-8"):
        build_backbone(path)


def test_create_model_refuses_what_nobody_reads() -> None:
    with pytest.raises(TypeError, match=r"drop_path: unknown key \(did you mean 'drop_path_rate'\?\)"):
        create_model("efficientformer_l1", drop_path=0.1)
    with pytest.raises(ValueError, match="name: got 'efficientformer_l2'.*one of efficientformer_l1"):
        create_model("efficientformer_l2")
    with pytest.raises(TypeError, match="pretrained: got 'efficientformer_l1'"):
        create_model("efficientformer_l1", pretrained="efficientformer_l1")
    with pytest.raises(TypeError, match="dtype: got torch.int8, allowed is a floating dtype"):
        create_model("efficientformer_l1", dtype=torch.int8)
    with pytest.raises(TypeError, match="two names of one thing"):
        create_model("efficientformer_l1", proj_drop=0.1, proj_drop_rate=0.1)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("in_chans", 0),
        ("num_classes", -1),
        ("global_pool", "max"),
        ("drop_rate", 2),
        ("drop_path_rate", -0.1),
        ("proj_drop_rate", 1.1),
        ("layer_scale_init_value", float("nan")),
        ("layer_scale_init_value", "1e-5"),
        ("backend", "cuda"),
        ("pretrained", True),
        ("reset_head", True),
    ],
)
def test_create_model_names_the_wrong_argument(argument: str, value: Any) -> None:
    extra = {"checkpoint": "x"} if argument == "pretrained" else {}
    name = "checkpoint" if argument == "pretrained" else argument
    with pytest.raises(ValueError, match=rf"{name}: got"):
        create_model("efficientformer_l1", device="meta", **{argument: value}, **extra)
