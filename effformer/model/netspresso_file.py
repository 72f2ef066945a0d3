"""The backbone's part of a NetsPresso Trainer configuration, read and checked."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..checks import COUNT, POSITIVE, POSITIVE_INT, PROBABILITY, Rule, key_problems, one_of, wrong
from ..config import ACTIVATIONS, TASKS, ConfigError, EfficientFormerConfig, Task
from .netspresso_layouts import since_0_1
from .netspresso_yaml import ABSENT, load_yaml, plain, resolvable, step

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
        source: the path of a YAML file, or its content as a mapping, OmegaConf's included. Three forms are read: a
            whole trainer file (`model.architecture.backbone` and `model.task`; every other key is left alone), a
            mapping with the key `backbone`, or the backbone itself (`name`, `params`, `stage_params`). The fields may
            have the layout of any version since 0.0.7. Interpolations (`${...}`) need the library omegaconf.
        task: replaces the file's task; upper and lower case are equal.

    Returns:
        the config, with NetsPresso's bilinear bias resizing, and the task.

    Raises:
        ConfigError: (a ValueError) naming every field that is missing, unknown or wrong; also where the file is not
            UTF-8 text or not YAML (then a yaml.YAMLError, too).
        OSError: where the file cannot be read.

    Source: docs/models/backbones/efficientformer.md of NetsPresso Trainer 1.4.1. Its table calls `num_blocks` "the
    number of 4D MetaBlock"; its examples and code count all blocks of the stage, and so do we.
    """
    where = str(source) if isinstance(source, (str, Path)) else "the NetsPresso mapping"
    content = load_yaml(source) if isinstance(source, (str, Path)) else source
    if not isinstance(content, Mapping):
        raise ConfigError([wrong("top level", content, "a mapping")], where)
    try:
        return _read(content, task, where)
    except RecursionError as error:
        raise ConfigError(["top level: nested too deeply"], where) from error


def _read(content: Mapping[str, Any], task: str | None, where: str) -> NetsPressoFile:
    problems: list[str] = []
    model, backbone, path = _find_backbone(resolvable(content, where), where, problems)
    name = "task"
    if task is None and "task" in set(model):
        name = "model.task"
        task = step(model, "task", name, problems)
    chosen = _lower(task)
    if chosen is not None and chosen is not ABSENT and not one_of(TASKS).holds(chosen):
        problems.append(wrong(name, chosen, one_of(TASKS).allowed))

    backbone = plain(backbone, path, problems)
    if not isinstance(backbone, dict):
        if backbone is not ABSENT:
            problems.append(wrong(path, backbone, "a mapping with name, params, stage_params") + _only_named(backbone))
        raise ConfigError(problems, where)
    prefix = f"{path}." if path else ""
    found: list[str] = []
    backbone, names = since_0_1(backbone, found)
    try:
        config = _read_config(backbone, found)
    except ConfigError as error:
        found += [_NAMES[field] + colon + rest for field, colon, rest in (p.partition(":") for p in error.problems)]
    for problem in found:
        field, colon, rest = problem.partition(":")
        problems.append(prefix + names.get(field, field) + colon + rest)
    if problems:
        raise ConfigError(problems, where)
    if names:
        warnings.warn(
            f"{where} has a layout of NetsPresso Trainer before 0.1: its fields are read as 1.4 would. Versions before "
            '1.0 resized the attention bias bicubically at image sizes other than 224: bias_resize="matrix-bicubic"',
            stacklevel=4,  # the caller of build_backbone
        )
    return NetsPressoFile(config, chosen)


def _find_backbone(content: Mapping[str, Any], where: str, problems: list[str]) -> tuple[Mapping[str, Any], Any, str]:
    """(the mapping with the task, the backbone, its path in the file)."""
    keys = set(content)
    if "model" not in keys:
        if "backbone" in keys:
            return {}, step(content, "backbone", "backbone", problems), "backbone"
        early = step(content, "train", "train", []) if "train" in keys else None
        if isinstance(early, Mapping) and "architecture" in set(early):
            problem = "train.architecture: a layout of NetsPresso Trainer before 0.0.7, without the backbone's fields"
            raise ConfigError([f"{problem}: write model.architecture.backbone{_FIELDS}"], where)
        return {}, content, ""
    found: Any = content
    for depth, key in enumerate(_PATH):
        path = ".".join(_PATH[: depth + 1])
        if not isinstance(found, Mapping) or key not in set(found):
            raise ConfigError(["model.architecture.backbone: missing"], where)
        if key == "backbone":
            _refuse_full(found, where, problems)
        found = step(found, key, path, problems)
        if found is ABSENT:
            raise ConfigError(problems, where)
        if key == "model":
            model = found
    return model, found, ".".join(_PATH)


_PATH = ("model", "architecture", "backbone")
_FIELDS = " with name, params, stage_params"


def _refuse_full(architecture: Mapping[str, Any], where: str, problems: list[str]) -> None:
    """Where `full` names a model, the trainer builds that one and leaves the backbone out."""
    path = "model.architecture.full"
    full = plain(step(architecture, "full", path, problems), path, problems) if "full" in set(architecture) else None
    named = full.get("name") if isinstance(full, dict) else full
    if named is not None and named is not ABSENT:
        allowed = "null: the trainer builds that model, without a backbone"
        raise ConfigError([*problems, wrong(path, named, allowed)], where)


def _only_named(backbone: Any) -> str:
    if _lower(backbone) != "efficientformer":
        return ""
    return ": NetsPresso Trainer before 0.0.7 named it alone, later versions need its fields"


def _read_config(backbone: Mapping[str, Any], problems: list[str]) -> EfficientFormerConfig:
    """The config of a backbone; wrong fields are added to `problems`, and stand-ins take their places."""
    problems += key_problems(backbone, ("name", "params", "stage_params"))
    if (name := backbone.get("name", ABSENT)) is not ABSENT and _lower(name) != "efficientformer":
        problems.append(wrong("name", name, "'efficientformer'"))
    params = _read_fields(backbone.get("params", ABSENT), _PARAMS, "params", problems)
    stages = backbone.get("stage_params", ABSENT)
    if stages is not ABSENT and not (isinstance(stages, list) and len(stages) == 4):
        problems.append(wrong("stage_params", stages, "a list of four stages, each with num_blocks and channels"))
        stages = ABSENT
    stages = [ABSENT] * 4 if stages is ABSENT else stages
    stages = [_read_fields(stage, _STAGE, f"stage_params[{i}]", problems) for i, stage in enumerate(stages)]

    heads, channels = params["num_attention_heads"], params["attention_channels"]
    key_dim, value_ratio = 1, 1
    if heads and channels and channels % heads:
        problems.append(wrong("params.attention_channels", channels, f"a multiple of {heads} heads"))
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
        if mapping is not ABSENT:
            problems.append(wrong(path, mapping, f"a mapping with {', '.join(fields)}"))
        mapping = {}
    found = {}
    for key, (rule, stand_in) in fields.items():
        value = _lower(mapping.get(key, ABSENT))
        found[key] = value if rule.holds(value) else stand_in
        if value is not ABSENT and not rule.holds(value):
            problems.append(wrong(f"{path}.{key}", mapping[key], rule.allowed))
    return found


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value
