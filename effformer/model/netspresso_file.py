"""The backbone's part of a NetsPresso Trainer configuration, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..checks import COUNT, POSITIVE, POSITIVE_INT, PROBABILITY, Rule, key_problems, one_of, wrong
from ..config import ACTIVATIONS, TASKS, ConfigError, EfficientFormerConfig, Task

_ABSENT: Any = object()  # a field whose absence was reported already
# Key -> its rule, and a value that stands in for a wrong one, so that the other fields are still checked.
_PARAMS: dict[str, tuple[Rule, Any]] = {
    "num_attention_heads": (POSITIVE_INT, None),
    "attention_channels": (POSITIVE_INT, None),
    "attention_dropout_prob": (PROBABILITY, 0),
    "attention_value_expansion_ratio": (POSITIVE, 1),
    "ffn_intermediate_ratio": (POSITIVE, 1),
    "ffn_dropout_prob": (PROBABILITY, 0),
    "ffn_act_type": (one_of(ACTIVATIONS), ACTIVATIONS[0]),
    "vit_num": (COUNT, 0),
}
_STAGE: dict[str, tuple[Rule, Any]] = {"num_blocks": (POSITIVE_INT, 2**20), "channels": (POSITIVE_INT, 2**20)}
# The config's fields that depend on each other -> the file's names.
_NAMES = {
    "num_vit": "params.vit_num",
    "value_ratio": "params.attention_value_expansion_ratio",
    "mlp_ratio": "params.ffn_intermediate_ratio",
    "widths[0]": "stage_params[0].channels",
}


class NetsPressoFile(NamedTuple):
    """The backbone of a trainer file; `task` is None where the file names none."""

    config: EfficientFormerConfig
    task: Task | None


def read_netspresso(source: str | Path | Mapping[str, Any], task: str | None = None) -> NetsPressoFile:
    """Read the backbone of a NetsPresso Trainer configuration.

    Args:
        source: the path of a YAML file, or its content as a mapping. Three forms are read: a whole trainer file
            (`model.architecture.backbone` and `model.task`; every other key is left alone), a mapping with the key
            `backbone`, or the backbone itself (`name`, `params`, `stage_params`).
        task: replaces the file's task; upper and lower case are equal.

    Returns:
        the config, with NetsPresso's bilinear bias resizing, and the task.

    Raises:
        ConfigError: naming every field that is missing, unknown or wrong.
        OSError, yaml.YAMLError: where the file cannot be read, or is not YAML.

    Source: docs/models/backbones/efficientformer.md of NetsPresso Trainer 1.4.1. Its table calls `num_blocks` "the
    number of 4D MetaBlock"; its examples and code count all blocks of the stage, and so do we.
    """
    if isinstance(source, (str, Path)):
        where = str(source)
        try:
            with open(source, encoding="utf-8") as file:
                content = yaml.load(file, _UniqueKeyLoader)  # a SafeLoader
        except UnicodeDecodeError as error:
            raise ConfigError([f"top level: not UTF-8 text ({error})"], where) from error
    else:
        where, content = "the NetsPresso mapping", source

    if not isinstance(content, Mapping):
        raise ConfigError([wrong("top level", content, "a mapping")], where)
    file_task, backbone, path = _find_backbone(content, where)
    problems: list[str] = []
    chosen = _lower(file_task if task is None else task)
    if chosen is not None and not one_of(TASKS).holds(chosen):
        problems.append(wrong("model.task" if task is None else "task", chosen, one_of(TASKS).allowed))
    prefix = f"{path}." if path else ""
    if not isinstance(backbone, Mapping):
        raise ConfigError([*problems, wrong(path, backbone, "a mapping with name, params, stage_params")], where)
    try:
        config = _read_config(backbone, prefix, problems)
    except ConfigError as error:
        for problem in error.problems:
            name, _, rest = problem.partition(":")
            problems.append(f"{prefix}{_NAMES[name]}:{rest}")
    if problems:
        raise ConfigError(problems, where)
    return NetsPressoFile(config, chosen)


def _find_backbone(content: Mapping[str, Any], where: str) -> tuple[Any, Any, str]:
    """(task, backbone, path of the backbone in the file)."""
    if "model" in content:
        model = content["model"]
        architecture = model.get("architecture") if isinstance(model, Mapping) else None
        if not isinstance(architecture, Mapping) or "backbone" not in architecture:
            raise ConfigError(["model.architecture.backbone: missing"], where)
        return model.get("task"), architecture["backbone"], "model.architecture.backbone"
    if "backbone" in content:
        return None, content["backbone"], "backbone"
    return None, content, ""


def _read_config(backbone: Mapping[str, Any], prefix: str, problems: list[str]) -> EfficientFormerConfig:
    """The config of a backbone; wrong fields are added to `problems`, and stand-ins take their places."""
    problems += key_problems(backbone, ("name", "params", "stage_params"), prefix)
    if backbone.get("name", "efficientformer") != "efficientformer":
        problems.append(wrong(f"{prefix}name", backbone["name"], "'efficientformer'"))
    params = _read_fields(backbone.get("params", _ABSENT), _PARAMS, f"{prefix}params", problems)
    stages = backbone.get("stage_params", [_ABSENT] * 4)
    if isinstance(stages, str) or not isinstance(stages, Sequence) or len(stages) != 4:
        allowed = "a list of four stages, each with num_blocks and channels"
        problems.append(wrong(f"{prefix}stage_params", stages, allowed))
        stages = [_ABSENT] * 4
    stages = [_read_fields(stage, _STAGE, f"{prefix}stage_params[{i}]", problems) for i, stage in enumerate(stages)]

    heads, channels = params["num_attention_heads"], params["attention_channels"]
    key_dim, value_ratio = 1, 1
    if heads and channels and channels % heads:
        problems.append(wrong(f"{prefix}params.attention_channels", channels, f"a multiple of {heads} heads"))
    elif heads and channels:
        key_dim, value_ratio = channels // heads, params["attention_value_expansion_ratio"]
    return EfficientFormerConfig(
        depths=tuple(stage["num_blocks"] for stage in stages),
        widths=tuple(stage["channels"] for stage in stages),
        num_vit=params["vit_num"],
        num_heads=heads or 1,
        key_dim=key_dim,
        value_ratio=value_ratio,
        mlp_ratio=params["ffn_intermediate_ratio"],
        act=params["ffn_act_type"],
        attn_drop=params["attention_dropout_prob"],
        proj_drop=params["ffn_dropout_prob"],
        bias_resize="matrix-bilinear",
    )


def _read_fields(
    mapping: Any, fields: Mapping[str, tuple[Rule, Any]], path: str, problems: list[str]
) -> dict[str, Any]:
    """The fields at `path`; wrong ones are added to `problems`, and stand-ins take their places."""
    if isinstance(mapping, Mapping):
        problems += key_problems(mapping, fields, f"{path}.")
    else:
        if mapping is not _ABSENT:
            problems.append(wrong(path, mapping, f"a mapping with {', '.join(fields)}"))
        mapping = {}
    found = {}
    for key, (rule, stand_in) in fields.items():
        value = _lower(mapping.get(key, _ABSENT))
        found[key] = value if rule.holds(value) else stand_in
        if value is not _ABSENT and not rule.holds(value):
            problems.append(wrong(f"{path}.{key}", mapping[key], rule.allowed))
    return found


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuse a key that stands twice: PyYAML would silently keep the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if (key := (key_node.tag, key_node.value)) in seen:
                problem = f"key {key_node.value!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)
