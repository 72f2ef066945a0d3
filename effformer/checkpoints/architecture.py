"""The architecture of another library's EfficientFormer, read from its state dict and its modules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..config import DENSE_TASKS, EfficientFormerConfig
from ..model.fusion import ACTIVATION_MODULES
from .formats import Format, Normalised, our_path

_ACTIVATIONS: dict[type[nn.Module], str] = {kind: name for name, kind in ACTIVATION_MODULES.items() if name != "swish"}


class Architecture(NamedTuple):
    """The arguments of `EfficientFormer`, without device and dtype; `task` is that of a NetsPresso backbone."""

    config: EfficientFormerConfig
    settings: dict[str, Any]
    stages: int  # how many of the four are there
    task: str | None


def our_modules(model: nn.Module, format: Format) -> Iterator[tuple[str, nn.Module]]:
    """The modules of `model`, by their paths in ours."""
    for path, module in model.named_modules():
        yield our_path(path, format), module


def read_architecture(model: nn.Module, file: Normalised) -> Architecture:
    """Read the architecture of the network `model`, whose normalised state dict is `file`.

    Raises:
        ValueError: for parts that our EfficientFormer never has, naming them.
    """
    state, modules = file.state, dict(our_modules(model, file.format))
    widths = [state["stem.conv2.weight"].shape[0]]
    while (weight := state.get(f"stages.{len(widths)}.downsample.conv.weight")) is not None:
        widths.append(weight.shape[0])
    stages = len(widths)
    # timm's pruned networks still know the widths of the stages that are gone.
    info = getattr(model, "feature_info", None) or []
    widths += [entry["num_chs"] for entry in list(info)[stages:]]
    if len(widths) != 4:
        raise ValueError(f"model: got {len(widths)} stages, allowed are 4")
    blocks = [_count(state, f"stages.{index}.blocks.", ".mlp.fc1.weight") for index in range(stages)]
    tables = [key for key in state if key.endswith(".token_mixer.attention_biases")]

    heads: dict[str, Any] = {}
    if tables:
        prefix = tables[0].removesuffix("attention_biases")
        num_heads, entries = state[tables[0]].shape
        value_dim = state[prefix + "proj.weight"].shape[1] // num_heads
        key_dim = (state[prefix + "qkv.weight"].shape[0] // num_heads - value_dim) // 2
        heads = {"num_heads": num_heads, "key_dim": key_dim, "value_ratio": value_dim / key_dim}
        heads["table_resolution"] = math.isqrt(entries)
    task: str | None = None
    if file.format == "netspresso":
        task = str(getattr(model, "task", DENSE_TASKS[0] if file.dense else "classification")).lower()
    config = EfficientFormerConfig(
        depths=(*blocks, *[1] * (4 - stages)),  # type: ignore[arg-type]
        widths=tuple(widths),  # type: ignore[arg-type]
        num_vit=sum(key.startswith("stages.3.") for key in tables),
        mlp_ratio=_mlp_ratio(state, widths),
        act=_activation(modules),
        attn_drop=_rate(modules, "token_mixer"),
        proj_drop=_rate(modules, "mlp"),
        **heads,
        **file.settings(),
    )
    head = state.get("head.weight")
    settings = {
        "in_chans": state["stem.conv1.weight"].shape[1],
        "num_classes": 0 if head is None else head.shape[0],
        "global_pool": getattr(model, "global_pool", "avg"),
        "drop_rate": getattr(modules.get("head_drop"), "p", 0.0),
    }
    return Architecture(config, settings, stages, task)


def _count(state: Mapping[str, Tensor], prefix: str, suffix: str) -> int:
    return sum(key.startswith(prefix) and key.endswith(suffix) for key in state)


def _mlp_ratio(state: Mapping[str, Tensor], widths: Sequence[int]) -> float:
    """A ratio that gives every stage its hidden channels, rounded down; the first stage's ratio where none does."""
    hidden = [state.get(f"stages.{index}.blocks.0.mlp.fc1.weight") for index in range(len(widths))]
    pairs = [(width, weight.shape[0]) for width, weight in zip(widths, hidden, strict=True) if weight is not None]
    least = max(channels / width for width, channels in pairs)
    ratios = (pairs[0][1] / pairs[0][0], least, least * (1 + 1e-12))
    fitting = (ratio for ratio in ratios if all(int(width * ratio) == channels for width, channels in pairs))
    return next(fitting, ratios[0])


def _activation(modules: Mapping[str, nn.Module]) -> str:
    """The activation of the MLPs; the stem's is always a ReLU."""
    found = {}
    for path, module in modules.items():
        if path.endswith(".act") and ".mlp" in path:
            if type(module) not in _ACTIVATIONS or getattr(module, "approximate", "none") != "none":
                raise ValueError(f"model: {path} is {module}, allowed are {', '.join(ACTIVATION_MODULES)}")
            found[_ACTIVATIONS[type(module)]] = path
    if len(found) != 1:
        raise ValueError(f"model: got the activations {', '.join(found) or 'none'}, allowed is one of them")
    return next(iter(found))


def _rate(modules: Mapping[str, nn.Module], part: str) -> float:
    """The one rate of the dropouts in these parts of the blocks."""
    rates = {module.p for path, module in modules.items() if f"{part}." in path and isinstance(module, nn.Dropout)}
    if len(rates) > 1:
        raise ValueError(f"model: got dropouts of {sorted(rates)} in one network's {part}, allowed is one rate")
    return rates.pop() if rates else 0.0
