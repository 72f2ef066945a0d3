"""A backbone in the layouts of NetsPresso Trainer before 0.1, rewritten in that of 0.1 to 1.4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checks import POSITIVE_INT, Rule, wrong
from .netspresso_yaml import ABSENT

# Name before 0.1 -> name since: the parameters, then the fields of a stage.
_PARAMS = {
    "attention_hidden_size": "attention_channels",
    "attention_ratio": "attention_value_expansion_ratio",
    "intermediate_ratio": "ffn_intermediate_ratio",
    "hidden_dropout_prob": "ffn_dropout_prob",
    "hidden_activation_type": "ffn_act_type",
}
_STAGE = {"num_blocks": "num_blocks", "hidden_sizes": "channels"}
# Fields that 0.1 took out -> the constant that it put in their place.
_FIXED = {
    "pool_size": 3,
    "layer_norm_eps": 1e-5,
    "drop_path_rate": 0,
    "use_layer_scale": True,
    "layer_scale_init_value": 1e-5,
    "down_patch_size": 3,
    "down_stride": 2,
    "down_pad": 1,
}
_SINCE = "since 0.1 of NetsPresso Trainer"


def since_0_1(backbone: Mapping[str, Any], problems: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Rewrite a backbone of dicts and lists, from whichever layout.

    Before 0.0.10 all fields stood in the backbone itself, those of the stages as lists; 0.0.10 had `params` and
    `stage_params` with the old names. Old and new names may stand side by side, as they did in between.

    Args:
        backbone: with `ABSENT` for values whose absence was reported.
        problems: gets a line for each field that the newer layout cannot express.

    Returns:
        the backbone in the layout of 0.1 to 1.4; and for each of its fields that stands elsewhere in the file, its
        path here -> its path there, by which `problems` are yet to be renamed.

    Source: models/backbones/experimental/efficientformer.py of netspresso-trainer 0.0.7, 0.0.9, 0.0.10, 0.1.0, 1.4.1.
    """
    names: dict[str, str] = {}
    new = dict(backbone)
    if not {"params", "stage_params"} & set(backbone) and {*_PARAMS, *_STAGE} & set(backbone):
        new = _nest(new, names, problems)
    if isinstance(params := new.get("params"), dict):
        params = _rename(params, _PARAMS, "params", names, problems)
        for key in [key for key in params if key in _FIXED or key == "attention_bias_resolution"]:
            value, rule = params.pop(key), _fixed_rule(key)
            if value is not ABSENT and not rule.holds(value):
                problems.append(wrong(f"params.{key}", value, rule.allowed))
        new["params"] = params
    if isinstance(stages := new.get("stage_params"), list):
        new["stage_params"] = _rename_stages(stages, names, problems)
    return new, names


def _fixed_rule(key: str) -> Rule:
    if key not in _FIXED:  # attention_bias_resolution, with which no version computed anything
        return POSITIVE_INT
    constant = _FIXED[key]
    allowed = f"{constant!r}, a constant {_SINCE}"
    return Rule(allowed, lambda value: isinstance(value, (int, float)) and value == constant)


def _nest(backbone: dict[str, Any], names: dict[str, str], problems: list[str]) -> dict[str, Any]:
    """From the layout before 0.0.10 to that of 0.0.10."""
    columns: dict[str, list[Any]] = {}
    for name in (*_STAGE, "downsamples"):
        value = backbone.get(name, ABSENT)
        if name not in backbone and name in _STAGE:
            problems.append(f"{name}: missing")
        elif value is not ABSENT and not (isinstance(value, list) and len(value) == 4):
            problems.append(wrong(name, value, "a list of four values, one for each stage"))
            value = ABSENT
        columns[name] = [ABSENT] * 4 if value is ABSENT else value
    params = {key: value for key, value in backbone.items() if key != "name" and key not in columns}
    stages = [{name: column[i] for name, column in columns.items()} for i in range(4)]
    names |= {f"params.{key}": str(key) for key in ("num_attention_heads", "attention_dropout_prob", *params)}
    names |= {f"params.{new}": old for old, new in _PARAMS.items()}
    names |= {f"stage_params[{i}].{name}": f"{name}[{i}]" for i in range(4) for name in columns}
    names |= {f"stage_params[{i}].channels": f"hidden_sizes[{i}]" for i in range(4)}
    kept = {key: backbone[key] for key in ("name",) if key in backbone}
    return kept | {"params": {"vit_num": 1} | params, "stage_params": stages}  # 1 was the default there


def _rename(
    fields: dict[Any, Any], renames: Mapping[str, str], path: str, names: dict[str, str], problems: list[str]
) -> dict[Any, Any]:
    renamed = {}
    for key, value in fields.items():
        new = renames.get(key, key)
        if new == key or new not in fields:
            renamed[new] = value
        else:
            problems.append(f"{path}.{key}: stands beside {new}, its name {_SINCE}: keep one of them")
        if new != key:
            names.setdefault(f"{path}.{new}", f"{path}.{key}")
    return renamed


def _rename_stages(stages: list[Any], names: dict[str, str], problems: list[str]) -> list[Any]:
    """Stages with the names since 0.1, without `downsamples`: every version since 0.1 computes as with True."""
    renamed = [
        _rename(stage, _STAGE, f"stage_params[{i}]", names, problems) if isinstance(stage, dict) else stage
        for i, stage in enumerate(stages)
    ]
    widths = [stage.get("channels") if isinstance(stage, dict) else None for stage in renamed]
    for i, stage in enumerate(renamed):
        value = stage.pop("downsamples", True) if isinstance(stage, dict) else True
        # It did not matter between stages of different widths, nor after the last.
        free = widths[i : i + 1] != widths[i + 1 : i + 2]
        if value is not ABSENT and not (value is True or (value is False and free)):
            allowed = f"True: a downsampling follows every stage {_SINCE}"
            problems.append(wrong(f"stage_params[{i}].downsamples", value, allowed))
    return renamed
