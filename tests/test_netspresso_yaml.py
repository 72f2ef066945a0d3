"""Configurations as OmegaConf reads them: numbers, keys, anchors, interpolations; and files that are none."""

from __future__ import annotations

import sys
from collections import UserDict, UserList
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import NETSPRESSO_L1
from omegaconf import OmegaConf

import effformer.netspresso
from effformer.config import ConfigError
from effformer.model.netspresso_file import read_netspresso
from effformer.model.netspresso_yaml import load_yaml

BACKBONE = """\
name: efficientformer
params: {num_attention_heads: HEADS, attention_channels: 256, attention_dropout_prob: DROP,
         attention_value_expansion_ratio: 4, ffn_intermediate_ratio: RATIO, ffn_dropout_prob: 0., ffn_act_type: gelu,
         vit_num: VIT}
stage_params: [{num_blocks: 3, channels: 48}, {num_blocks: 2, channels: 96}, {num_blocks: 6, channels: 224},
               {num_blocks: 4, channels: 448}]
"""


SCALARS = """1e-1 1e-5 1E5 1e+2 1.e-1 .5 1. 0.1e1 -1e-3 +1e3 1_000 1_0.5 1_0e1 .1_5 0x10 010 1:30 1:30.5 .inf -.INF yes No
on OFF True y n ~ null 1e 1e- e5 1_e5 +.5 -.5 .5e3 .5e-3 1.5e3 2020-01-01 0o10 1__0.5 '1e-1' 12e03"""


def text(*, heads: str = "8", drop: str = "0.", ratio: str = "4", vit: str = "1") -> str:
    values = {"HEADS": heads, "DROP": drop, "RATIO": ratio, "VIT": vit}
    result = BACKBONE
    for name, value in values.items():
        result = result.replace(name, value)
    return result


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(content: str | bytes) -> Path:
        path = tmp_path / "trainer.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def problems(source: Any, task: str | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as error:
        read_netspresso(source, task)
    return error.value.problems


def test_numbers_are_those_of_omegaconf(write: Any) -> None:
    scalars = SCALARS.split()
    path = write("[" + ", ".join(scalars) + "]")
    ours, theirs = load_yaml(path), list(OmegaConf.load(path))
    assert [(s, type(x), x) for s, x in zip(scalars, ours, strict=True)] == [
        (s, type(x), x) for s, x in zip(scalars, theirs, strict=True)
    ]
    assert ours[:4] == [0.1, 1e-5, 1e5, 100.0]


@pytest.mark.parametrize(
    ("written", "value"), [("2e-1", 0.2), ("5E-2", 0.05), (".25", 0.25), ("1.", 1.0), ("1_0e-2", 0.1)]
)
def test_a_probability_in_any_notation(write: Any, written: str, value: float) -> None:
    assert read_netspresso(write(text(drop=written))).config.attn_drop == value


def test_numbers_that_are_none_stay_wrong(write: Any) -> None:
    assert problems(write(text(drop="'1e-1'", vit="yes", heads="8e0"))) == (
        "params.num_attention_heads: got 8.0 (float), allowed is an integer of 1 or more",
        "params.attention_dropout_prob: got '1e-1' (str), allowed is a number from 0 to 1",
        "params.vit_num: got True (bool), allowed is an integer of 0 or more",
    )


def test_anchors_and_merges(write: Any) -> None:
    path = write("""
deep: {down: {common: &common {<<: &base {num_blocks: 2, channels: 32}, channels: 48}}}
model:
  task: &task Detection
  architecture:
    backbone:
      name: EfficientFormer
      params: &params
        <<: {num_attention_heads: 8, attention_channels: 256, attention_dropout_prob: 1e-1, vit_num: 3}
        attention_value_expansion_ratio: 4
        ffn_intermediate_ratio: &four 4
        ffn_dropout_prob: 0
        ffn_act_type: gelu
        vit_num: 1
      stage_params: [*base, *common, {<<: [{num_blocks: 5}, *base], channels: 224}, {num_blocks: *four, channels: 448}]
other: {<<: *params, vit_num: 2, task: *task}
""")
    config, task = read_netspresso(path)
    assert (config.widths, config.depths) == ((32, 48, 224, 448), (2, 2, 5, 4))
    assert (config.num_vit, config.attn_drop, task) == (1, 0.1, "detection")
    assert read_netspresso(OmegaConf.load(path)) == (config, task)


def test_a_merge_used_before_its_own_turn_repeats_no_key(write: Any) -> None:
    """PyYAML builds deep mappings last, and merging `deep.one.two` into `late` writes its keys out before that."""
    merged = "deep: {one: {two: &two {<<: {a: 1}, a: 2}}}\nlate: {<<: *two}\nbackbone:\n"
    path = write(merged + "".join(f"  {line}\n" for line in text().splitlines()))
    assert load_yaml(path)["late"] == OmegaConf.load(path)["late"] == {"a": 2}
    assert read_netspresso(path).config.widths == (48, 96, 224, 448)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("vit_num: 1\n'vit_num': 2\n", "line 2, column 1: key 'vit_num' stands twice"),
        ("a: {b: [{c: 1, c: 1}]}\n", "line 1, column 16: key 'c' stands twice"),
        ("name: efficientformer\n\tparams: 1\n", "line 2, column 1: found a tab character that violates indentation"),
        (
            "a: 1\n---\nb: 2\n",
            "line 2, column 1: but found another document (expected a single document in the stream)",
        ),
        ("a: &a [*a]\n", "line 1, column 4: an alias stands within its own anchor"),
        ("a: {<<: 1}\n", "<< allows a mapping or a list of mappings"),
        ("a: *b\n", "found undefined alias"),
        ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("a: [1\n", "expected ',' or ']'"),
        ("a: \x00\n", "control characters are not allowed"),
        ("a0: &a0 [1]\n" + "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i}, ' * 9}]\n" for i in range(9)), "100,000 nodes"),
    ],
)
def test_files_that_are_no_yaml_are_refused_in_a_line(write: Any, content: str, problem: str) -> None:
    path = write(content)
    (line,) = problems(path)
    assert problem in line
    with pytest.raises(yaml.YAMLError, match=r"trainer\.yaml has 1 problem"):
        effformer.build_backbone(path)
    with pytest.raises(Exception, match=r"."):  # the trainer reads none of them either
        OmegaConf.load(path)


def test_tabs_where_yaml_allows_them(write: Any) -> None:
    path = write(text().replace("name: efficientformer", "name:\tefficientformer\t# a comment"))
    assert OmegaConf.load(path).name == "efficientformer"
    assert read_netspresso(path).config.num_vit == 1


def test_other_files_that_hold_no_configuration(write: Any) -> None:
    for content in ("", "# a comment\n", "---\n"):
        assert problems(write(content)) == ("top level: the file is empty, allowed is a mapping",)
    assert problems(write("- backbone: {}\n")) == ("top level: got [{'backbone': {}}] (list), allowed is a mapping",)
    assert "not UTF-8" in problems(write(text().encode("utf-16")))[0]
    assert problems(write("[" * 100_000))[0].startswith(("top level: nested too deeply", "line 1"))
    assert read_netspresso(write(b"\xef\xbb\xbf" + text().encode())).config.num_vit == 1


def test_a_list_of_one_is_no_mapping(write: Any) -> None:
    backbone = NETSPRESSO_L1 | {"params": [NETSPRESSO_L1["params"]]}
    assert problems(backbone)[0].startswith("params: got [{")
    assert problems(write(text(vit="[1]"))) == ("params.vit_num: got [1] (list), allowed is an integer of 0 or more",)


def whole(backbone: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"model": {"task": "detection", "architecture": {"full": None, "backbone": backbone}}} | rest


def interpolated() -> dict[str, Any]:
    params = NETSPRESSO_L1["params"] | {
        "num_attention_heads": "${heads}",  # absolute
        "attention_channels": "${.num_attention_heads}",  # relative
        "attention_value_expansion_ratio": "${..stage_params.0.num_blocks}",
        "ffn_act_type": "${oc.env:EFFFORMER_TEST_ACT,relu}",
        "ffn_dropout_prob": "${oc.decode:${oc.env:EFFFORMER_TEST_DROP}}",
    }
    return whole(NETSPRESSO_L1 | {"params": params}, heads=16, losses="${losses_of_another_file}")


def test_interpolations(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFFORMER_TEST_DROP", "1e-1")
    monkeypatch.delenv("EFFFORMER_TEST_ACT", raising=False)
    content = interpolated()
    node = OmegaConf.create(content)
    for source in (content, write(yaml.safe_dump(content)), node, UserDict(content)):
        config, task = read_netspresso(source)
        assert (config.num_heads, config.key_dim, config.value_ratio) == (16, 1, 3)
        assert (config.act, config.proj_drop, task) == ("relu", 0.1, "detection")
    monkeypatch.setenv("EFFFORMER_TEST_ACT", "silu")
    assert read_netspresso(content).config.act == "silu"
    stages = UserList([*NETSPRESSO_L1["stage_params"][:3], UserDict(num_blocks="${vit}", channels=448)])
    own = {"backbone": NETSPRESSO_L1 | {"stage_params": stages}, "vit": 2}
    assert read_netspresso(own).config.depths == (3, 2, 6, 2)
    # As the trainer calls us: a node below its root.
    backbone = effformer.netspresso.efficientformer("detection", node.model.architecture.backbone)
    assert backbone.network.config.num_heads == 16


def test_whole_parts_may_be_interpolations() -> None:
    parts = {
        "blocks": NETSPRESSO_L1["stage_params"],
        "backbones": {"l1": NETSPRESSO_L1 | {"stage_params": "${blocks}"}},
    }
    content = {"model": "${models.detector}", "models": {"detector": whole("${backbones.l1}")["model"]}} | parts  # type: ignore[arg-type]
    assert read_netspresso(content).config.widths == (48, 96, 224, 448)


def test_interpolations_that_resolve_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EFFFORMER_TEST_DROP", raising=False)
    content = interpolated()
    content["model"]["architecture"]["backbone"]["params"]["vit_num"] = "${data.vit}"
    content["model"]["task"] = "${..task}"
    for source in (content, OmegaConf.create(content)):
        task, drop, vit = problems(source)
        assert task.startswith("model.task: Interpolation key '..task' not found")
        assert drop == (
            "model.architecture.backbone.params.ffn_dropout_prob: KeyError raised while resolving interpolation: "
            "\"Environment variable 'EFFFORMER_TEST_DROP' not found\""
        )
        assert vit == (
            "model.architecture.backbone.params.vit_num: Interpolation key 'data.vit' not found (the trainer merges its "
            "files before it resolves: pass the merged configuration)"
        )
    assert len(problems(content, "detection")) == 2  # the argument replaces the file's task
    (malformed,) = problems({"backbone": NETSPRESSO_L1 | {"name": "${unclosed"}})
    assert malformed.startswith("backbone.name: ")


def test_without_omegaconf_an_interpolation_is_refused_where_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    content = whole(dict(NETSPRESSO_L1), losses="${elsewhere}", data={"path": "${oc.env:HOME}"})
    assert read_netspresso(content).task == "detection"
    content["model"]["architecture"]["backbone"]["params"] = NETSPRESSO_L1["params"] | {"vit_num": "${vit}"}
    assert problems(content) == (
        "model.architecture.backbone.params.vit_num: got '${vit}', an interpolation, which needs OmegaConf: "
        'pip install "omegaconf>=2.3"',
    )


@pytest.mark.parametrize("convert", [dict, OmegaConf.create])
def test_question_marks_are_a_missing_value(convert: Any) -> None:
    params = NETSPRESSO_L1["params"] | {"vit_num": "???"}
    stages = [*NETSPRESSO_L1["stage_params"][:3], "???"]
    content = convert(whole({"name": "???", "params": params, "stage_params": stages}, losses="???"))
    missing = "missing: '???' stands for a value that must be given"
    names = ("name", "params.vit_num", "stage_params[3]")
    assert problems(content) == tuple(f"model.architecture.backbone.{name}: {missing}" for name in names)
    assert problems(convert(whole("???"))) == (f"model.architecture.backbone: {missing}",)  # type: ignore[arg-type]
    assert problems(convert({"model": "???"})) == (f"model: {missing}",)
    assert problems(convert({"backbone": "???"})) == (f"backbone: {missing}",)
    with pytest.raises(ConfigError, match=r"model\.architecture\.backbone has 3 problem"):
        effformer.netspresso.efficientformer("detection", content["model"]["architecture"]["backbone"])


def test_nodes_of_omegaconf_are_mappings(write: Any) -> None:
    path = write(yaml.safe_dump(whole(dict(NETSPRESSO_L1))))
    assert read_netspresso(OmegaConf.load(path)) == read_netspresso(path)
    node = OmegaConf.load(path).model.architecture.backbone
    assert read_netspresso(node).config == read_netspresso(NETSPRESSO_L1).config
    assert node == NETSPRESSO_L1
    assert problems(OmegaConf.create([1])) == ("top level: got [1] (ListConfig), allowed is a mapping",)


def test_a_path_as_omegaconf_saves_it(write: Any, tmp_path: Path) -> None:
    OmegaConf.save(
        OmegaConf.create(whole(dict(NETSPRESSO_L1), data={"root": Path("/data/x")})), tmp_path / "saved.yaml"
    )
    assert load_yaml(tmp_path / "saved.yaml")["data"]["root"].as_posix() == "/data/x"
    assert read_netspresso(tmp_path / "saved.yaml").task == "detection"


def test_a_mapping_within_itself() -> None:
    backbone: dict[str, Any] = dict(NETSPRESSO_L1)
    backbone["params"] = backbone
    assert problems(backbone) == ("top level: nested too deeply",)
