"""What defines an EfficientFormer: the config, the published variants, NetsPresso's YAML."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import yaml

BiasResize = Literal["table", "matrix-bilinear", "matrix-bicubic"]
FeatureNorm = Literal["tap", "inline"]
Task = Literal["classification", "segmentation", "detection", "pose_estimation"]

BIAS_RESIZES: tuple[str, ...] = get_args(BiasResize)
FEATURE_NORMS: tuple[str, ...] = get_args(FeatureNorm)
TASKS: tuple[str, ...] = get_args(Task)
DENSE_TASKS = TASKS[1:]

# NetsPresso Trainer's activation registry (models/op/registry.py). "swish" is "silu".
ACTIVATIONS = ("gelu", "relu", "silu", "swish", "hard_swish", "relu6", "leaky_relu", "prelu")


class ConfigError(ValueError):
    """One or more fields are wrong. `problems` holds a line for each: field, what came, what is allowed."""

    def __init__(self, problems: Sequence[str], where: str) -> None:
        self.problems = tuple(problems)
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(f"{where} has {len(self.problems)} problem(s):{lines}")


class _Rule(NamedTuple):
    allowed: str
    holds: Callable[[Any], bool]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _one_of(names: Iterable[str]) -> _Rule:
    choices = tuple(names)
    return _Rule("one of " + ", ".join(choices), lambda value: isinstance(value, str) and value in choices)


_POSITIVE_INT = _Rule("an integer of 1 or more", lambda value: _is_int(value) and value >= 1)
_COUNT = _Rule("an integer of 0 or more", lambda value: _is_int(value) and value >= 0)
_POSITIVE = _Rule("a number above 0", lambda value: _is_number(value) and 0 < value < float("inf"))
_PROBABILITY = _Rule("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
_FOUR_POSITIVE_INTS = _Rule(
    "four integers of 1 or more",
    lambda value: isinstance(value, tuple) and len(value) == 4 and all(_POSITIVE_INT.holds(item) for item in value),
)


def _wrong(field: str, value: Any, allowed: str) -> str:
    return f"{field}: got {value!r} ({type(value).__name__}), allowed is {allowed}"


def unknown_key(key: Any, allowed: Iterable[str]) -> str:
    """The message for a key that nobody reads, with the likeliest intended one."""
    choices = list(allowed)
    close = difflib.get_close_matches(str(key), choices, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{key}: unknown key{hint}, allowed are {', '.join(choices)}"


@dataclass(frozen=True, kw_only=True)
class EfficientFormerConfig:
    """The architecture, without anything that depends on a data set or a training run.

    Attributes:
        depths: blocks in each of the four stages, 3D blocks of the last one included.
        widths: channels of each stage.
        num_vit: how many of the last stage's blocks, counted from the end, are 3D (attention) blocks.
        num_heads: attention heads of a 3D block.
        key_dim: channels of a query and of a key, for each head.
        value_ratio: channels of a value, for each head, divided by `key_dim`.
        mlp_ratio: hidden channels of both kinds of MLP divided by the block's width.
        act: activation of the MLPs (the stem always uses ReLU).
        attn_drop: dropout on the attention probabilities and on the attention's projected output.
        proj_drop: dropout after the activation and on the output of the MLPs.
        bias_resize: how the attention bias meets a map of another size, see `ops.expand_bias`.
        table_resolution: side T of the bias table [num_heads, T * T]; 7 is 224 / 32.
        feature_norm: GroupNorm(1) on each stage's output: None; "tap", on the returned maps only (the original
            dense variant); "inline", the next stage receives the normalised map too (NetsPresso's dense tasks).

    Raises:
        ConfigError: naming every field that is wrong.
    """

    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int]
    num_vit: int
    num_heads: int = 8
    key_dim: int = 32
    value_ratio: float = 4
    mlp_ratio: float = 4
    act: str = "gelu"
    attn_drop: float = 0.0
    proj_drop: float = 0.0
    bias_resize: BiasResize = "table"
    table_resolution: int = 7
    feature_norm: FeatureNorm | None = None

    def __post_init__(self) -> None:
        for name in ("depths", "widths"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        problems = [
            _wrong(name, getattr(self, name), rule.allowed)
            for name, rule in _CONFIG_RULES.items()
            if not rule.holds(getattr(self, name))
        ]
        if not problems:
            problems = list(self._cross_checks())
        if problems:
            raise ConfigError(problems, type(self).__name__)

    def _cross_checks(self) -> Iterable[str]:
        if self.num_vit > self.depths[-1]:
            yield _wrong("num_vit", self.num_vit, f"at most the {self.depths[-1]} blocks of the last stage")
        if self.widths[0] % 2:
            yield _wrong("widths[0]", self.widths[0], "an even number (the stem's first convolution has half of it)")
        if not float(self.value_ratio * self.key_dim).is_integer():
            yield _wrong("value_ratio", self.value_ratio, f"a ratio whose product with key_dim {self.key_dim} is whole")
        if int(min(self.widths) * self.mlp_ratio) < 1:
            yield _wrong("mlp_ratio", self.mlp_ratio, "a ratio that leaves every stage at least one hidden channel")

    @property
    def value_dim(self) -> int:
        """Channels of a value, for each head."""
        return int(self.value_ratio * self.key_dim)


_CONFIG_RULES: dict[str, _Rule] = {
    "depths": _FOUR_POSITIVE_INTS,
    "widths": _FOUR_POSITIVE_INTS,
    "num_vit": _COUNT,
    "num_heads": _POSITIVE_INT,
    "key_dim": _POSITIVE_INT,
    "value_ratio": _POSITIVE,
    "mlp_ratio": _POSITIVE,
    "act": _one_of(ACTIVATIONS),
    "attn_drop": _PROBABILITY,
    "proj_drop": _PROBABILITY,
    "bias_resize": _one_of(BIAS_RESIZES),
    "table_resolution": _POSITIVE_INT,
    "feature_norm": _Rule(
        "None, " + ", ".join(FEATURE_NORMS), lambda value: value is None or _one_of(FEATURE_NORMS).holds(value)
    ),
}
CONFIG_FIELDS = tuple(field.name for field in dataclasses.fields(EfficientFormerConfig))

# Paper, table 5 and appendix; the numbers are those of the original models/efficientformer.py.
PRESETS: dict[str, EfficientFormerConfig] = {
    "efficientformer_l1": EfficientFormerConfig(depths=(3, 2, 6, 4), widths=(48, 96, 224, 448), num_vit=1),
    "efficientformer_l3": EfficientFormerConfig(depths=(4, 4, 12, 6), widths=(64, 128, 320, 512), num_vit=4),
    "efficientformer_l7": EfficientFormerConfig(depths=(6, 6, 18, 8), widths=(96, 192, 384, 768), num_vit=8),
}


def preset(name: str) -> EfficientFormerConfig:
    """The config of a published variant.

    Raises:
        ValueError: for a name that is not in `PRESETS`.
    """
    check_choice("name", name, PRESETS)
    return PRESETS[name]


def check_choice(argument: str, value: Any, choices: Iterable[str]) -> None:
    """Raise a ValueError that names the argument unless `value` is one of `choices`."""
    rule = _one_of(choices)
    if not rule.holds(value):
        raise ValueError(_wrong(argument, value, rule.allowed))


def check_probability(argument: str, value: Any) -> None:
    """Raise a ValueError that names the argument unless `value` is a number from 0 to 1."""
    if not _PROBABILITY.holds(value):
        raise ValueError(_wrong(argument, value, _PROBABILITY.allowed))


def check_finite(argument: str, value: Any) -> None:
    """Raise a ValueError that names the argument unless `value` is a finite number."""
    if not (_is_number(value) and math.isfinite(value)):
        raise ValueError(_wrong(argument, value, "a finite number"))


def check_count(argument: str, value: Any, *, least: int = 0) -> None:
    """Raise a ValueError that names the argument unless `value` is an integer of `least` or more."""
    if not (_is_int(value) and value >= least):
        raise ValueError(_wrong(argument, value, f"an integer of {least} or more"))


# --- NetsPresso Trainer ---------------------------------------------------------------------------------------------

_PARAM_RULES: dict[str, _Rule] = {
    "num_attention_heads": _POSITIVE_INT,
    "attention_channels": _POSITIVE_INT,
    "attention_dropout_prob": _PROBABILITY,
    "attention_value_expansion_ratio": _POSITIVE,
    "ffn_intermediate_ratio": _POSITIVE,
    "ffn_dropout_prob": _PROBABILITY,
    "ffn_act_type": _one_of(ACTIVATIONS),
    "vit_num": _COUNT,
}
_STAGE_RULES: dict[str, _Rule] = {"num_blocks": _POSITIVE_INT, "channels": _POSITIVE_INT}


class NetsPressoFile(NamedTuple):
    """What a trainer file says of its backbone; `task` is None where it names none."""

    config: EfficientFormerConfig
    task: Task | None


def read_netspresso(source: str | Path | Mapping[str, Any], task: str | None = None) -> NetsPressoFile:
    """Read the backbone of a NetsPresso Trainer configuration.

    Args:
        source: a YAML file or what one holds: a whole trainer file (`model.architecture.backbone` is read, and
            `model.task`; every other key is left alone), a mapping with the key `backbone`, or the backbone itself
            (`name`, `params`, `stage_params`).
        task: beats the file's, in any case.

    Returns:
        the config, with NetsPresso's bilinear bias resizing, and the task.

    Raises:
        ConfigError: naming every field that is missing, unknown or wrong.
        OSError, yaml.YAMLError: where the file cannot be read, or is no YAML.

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
        raise ConfigError([_wrong("top level", content, "a mapping")], where)
    file_task, backbone, path = _find_backbone(content, where)
    problems: list[str] = []
    chosen = _lower(file_task if task is None else task)
    if chosen is not None and not _one_of(TASKS).holds(chosen):
        problems.append(_wrong("model.task" if task is None else "task", chosen, _one_of(TASKS).allowed))
    problems += _backbone_problems(backbone, path)
    if problems:
        raise ConfigError(problems, where)

    params, stages = backbone["params"], backbone["stage_params"]
    config = EfficientFormerConfig(
        depths=tuple(stage["num_blocks"] for stage in stages),
        widths=tuple(stage["channels"] for stage in stages),
        num_vit=params["vit_num"],
        num_heads=params["num_attention_heads"],
        key_dim=params["attention_channels"] // params["num_attention_heads"],
        value_ratio=params["attention_value_expansion_ratio"],
        mlp_ratio=params["ffn_intermediate_ratio"],
        act=params["ffn_act_type"].lower(),
        attn_drop=params["attention_dropout_prob"],
        proj_drop=params["ffn_dropout_prob"],
        bias_resize="matrix-bilinear",
    )
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


def _backbone_problems(backbone: Any, path: str) -> Iterable[str]:
    prefix = f"{path}." if path else ""
    if not isinstance(backbone, Mapping):
        yield _wrong(path, backbone, "a mapping with name, params, stage_params")
        return
    yield from key_problems(backbone, ("name", "params", "stage_params"), prefix)
    if backbone.get("name", "efficientformer") != "efficientformer":
        yield _wrong(f"{prefix}name", backbone["name"], "'efficientformer'")

    params = backbone.get("params", {})
    if not isinstance(params, Mapping):
        yield _wrong(f"{prefix}params", params, "a mapping")
        params = {}
    elif "params" in backbone:
        yield from _field_problems(params, _PARAM_RULES, f"{prefix}params.")

    stages = backbone.get("stage_params", [])
    if "stage_params" in backbone:
        if isinstance(stages, str) or not isinstance(stages, Sequence) or len(stages) != 4:
            yield _wrong(f"{prefix}stage_params", stages, "a list of four stages, each with num_blocks and channels")
            stages = []
        for index, stage in enumerate(stages):
            if isinstance(stage, Mapping):
                yield from _field_problems(stage, _STAGE_RULES, f"{prefix}stage_params[{index}].")
            else:
                yield _wrong(f"{prefix}stage_params[{index}]", stage, "a mapping with num_blocks and channels")

    yield from _cross_field_problems(params, stages, prefix)


def key_problems(mapping: Mapping[Any, Any], allowed: Iterable[str], prefix: str = "") -> Iterable[str]:
    """A line for each key of `mapping` that is not in `allowed`, and for each of `allowed` that it does not have."""
    allowed = tuple(allowed)
    yield from (prefix + unknown_key(key, allowed) for key in mapping if key not in allowed)
    yield from (f"{prefix}{key}: missing" for key in allowed if key not in mapping)


def _field_problems(mapping: Mapping[Any, Any], rules: Mapping[str, _Rule], prefix: str) -> Iterable[str]:
    yield from key_problems(mapping, rules, prefix)
    for key, rule in rules.items():
        if key in mapping and not rule.holds(_lower(mapping[key])):
            yield _wrong(prefix + key, mapping[key], rule.allowed)


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _cross_field_problems(params: Mapping[str, Any], stages: Sequence[Any], prefix: str) -> Iterable[str]:
    """What `EfficientFormerConfig` would refuse, in the file's own words. Fields of a wrong type are skipped."""
    heads, channels, ratio, vit_num, mlp_ratio = (
        params.get(key) if _PARAM_RULES[key].holds(params.get(key)) else None
        for key in ("num_attention_heads", "attention_channels", "attention_value_expansion_ratio", "vit_num",
                    "ffn_intermediate_ratio")
    )  # fmt: skip
    if heads and channels:
        if channels % heads:
            allowed = f"a multiple of num_attention_heads ({heads})"
            yield _wrong(f"{prefix}params.attention_channels", channels, allowed)
        elif ratio and not (channels / heads * ratio).is_integer():
            allowed = f"a ratio whose product with the {channels // heads} key channels of a head is whole"
            yield _wrong(f"{prefix}params.attention_value_expansion_ratio", ratio, allowed)

    stages = [stage if isinstance(stage, Mapping) else {} for stage in stages]
    blocks = stages[-1].get("num_blocks") if stages else None
    if vit_num and _is_int(blocks) and vit_num > blocks:
        yield _wrong(f"{prefix}params.vit_num", vit_num, f"at most the {blocks} blocks of the last stage")
    widths = [width for stage in stages if _POSITIVE_INT.holds(width := stage.get("channels"))]
    if mlp_ratio and widths and int(min(widths) * mlp_ratio) < 1:
        allowed = "a ratio that leaves every stage at least one hidden channel"
        yield _wrong(f"{prefix}params.ffn_intermediate_ratio", mlp_ratio, allowed)
    if stages and _POSITIVE_INT.holds(first := stages[0].get("channels")) and first % 2:
        allowed = "an even number (the stem's first convolution has half of it)"
        yield _wrong(f"{prefix}stage_params[0].channels", first, allowed)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys; a value that is silently lost is an error here."""

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
