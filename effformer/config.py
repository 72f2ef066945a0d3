"""The configuration of an EfficientFormer, and the published variants."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .checks import COUNT, POSITIVE, POSITIVE_INT, PROBABILITY, Rule, check_choice, one_of, plain, wrong

BiasResize = Literal["table", "matrix-bilinear", "matrix-bicubic"]
FeatureNorm = Literal["tap", "inline"]
Task = Literal["classification", "segmentation", "detection", "pose_estimation"]

BIAS_RESIZES: tuple[str, ...] = get_args(BiasResize)
FEATURE_NORMS: tuple[str, ...] = get_args(FeatureNorm)
TASKS: tuple[str, ...] = get_args(Task)
DENSE_TASKS = TASKS[1:]

# NetsPresso Trainer's activation registry (models/op/registry.py). "swish" is "silu".
ACTIVATIONS = ("gelu", "relu", "silu", "swish", "hard_swish", "relu6", "leaky_relu", "prelu")


LEAST_SIDE = 32  # of images: one pixel of the last feature map


class ConfigError(ValueError):
    """One or more fields are wrong. `problems` holds a line for each: field, value, allowed values."""

    def __init__(self, problems: Sequence[str], where: str) -> None:
        self.problems = tuple(problems)
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(f"{where} has {len(self.problems)} problem(s):{lines}")


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
            if isinstance(value := getattr(self, name), list) or getattr(value, "ndim", 0) == 1:
                object.__setattr__(self, name, tuple(value))
        for name in _CONFIG_RULES:  # a config is written as JSON
            object.__setattr__(self, name, plain(getattr(self, name)))
        problems = [
            wrong(name, getattr(self, name), rule.allowed)
            for name, rule in _CONFIG_RULES.items()
            if not rule.holds(getattr(self, name))
        ]
        if not problems:
            problems = list(self._cross_checks())
        if problems:
            raise ConfigError(problems, type(self).__name__)

    def _cross_checks(self) -> Iterable[str]:
        if self.num_vit > self.depths[-1]:
            yield wrong("num_vit", self.num_vit, f"at most the {self.depths[-1]} blocks of the last stage")
        if self.widths[0] % 2:
            yield wrong("widths[0]", self.widths[0], "an even number (the stem's first convolution has half of it)")
        if not float(self.value_ratio * self.key_dim).is_integer():
            yield wrong("value_ratio", self.value_ratio, f"a ratio whose product with key_dim {self.key_dim} is whole")
        if int(min(self.widths) * self.mlp_ratio) < 1:
            yield wrong("mlp_ratio", self.mlp_ratio, "a ratio that leaves every stage at least one hidden channel")

    @property
    def value_dim(self) -> int:
        """Channels of a value, for each head."""
        return int(self.value_ratio * self.key_dim)


_FOUR = Rule(
    "four integers of 1 or more",
    lambda value: isinstance(value, tuple) and len(value) == 4 and all(map(POSITIVE_INT.holds, value)),
)
_CONFIG_RULES: dict[str, Rule] = {
    "depths": _FOUR,
    "widths": _FOUR,
    "num_vit": COUNT,
    "num_heads": POSITIVE_INT,
    "key_dim": POSITIVE_INT,
    "value_ratio": POSITIVE,
    "mlp_ratio": POSITIVE,
    "act": one_of(ACTIVATIONS),
    "attn_drop": PROBABILITY,
    "proj_drop": PROBABILITY,
    "bias_resize": one_of(BIAS_RESIZES),
    "table_resolution": POSITIVE_INT,
    "feature_norm": Rule(
        "None, " + ", ".join(FEATURE_NORMS), lambda value: value is None or one_of(FEATURE_NORMS).holds(value)
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


# The images that the published weights were trained for: `effformer.Preprocessing` makes them.
PUBLISHED_INPUT: dict[str, Any] = {
    "size": (224, 224),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 0.95,
}
