"""What the `config.json` beside a saved network's weights says, and the network rebuilt from it."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import asdict, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config import CONFIG_FIELDS, PRESETS, ConfigError, EfficientFormerConfig, key_problems, unknown_key
from ..model.network import CONSTRUCTOR_FIELDS, EfficientFormer

ARCHITECTURE = "effformer.EfficientFormer"
_ARGUMENTS = ("in_chans", "num_classes", "global_pool", "drop_rate", "drop_path_rate")
_KEYS = ("architecture", *CONFIG_FIELDS, *_ARGUMENTS, "dtype")

Network = TypeVar("Network", bound=EfficientFormer)


def settings_of(network: EfficientFormer) -> dict[str, Any]:
    """What rebuilds the network, but for its weights: the config, and arguments that are no choice of a run.

    Backend, device and modes are such a choice, and not in it.

    Raises:
        ValueError: for a network that was pruned, whose modules were replaced, or with parameters of several dtypes.
    """
    settings = {"architecture": ARCHITECTURE, **asdict(network.config)}
    settings |= {name: getattr(network, name) for name in _ARGUMENTS}
    settings["dtype"] = str(network.stem.conv1.weight.dtype).removeprefix("torch.")
    found, expected = _describe(network), _describe(rebuild(settings, "the network", EfficientFormer, device="meta"))
    if different := sorted(found.items() ^ expected.items()):
        raise ValueError(f"network: {different[0][0]} is not what the config describes: pruned, replaced, other dtype?")
    return settings


def is_saved(settings: Mapping[str, Any]) -> bool:
    """Whether this is what `settings_of` returned once."""
    return settings.get("architecture") == ARCHITECTURE


def rebuild(settings: Mapping[str, Any], where: str, kind: type[Network], **overrides: Any) -> Network:
    """A network with random weights from what `settings_of` returned.

    Args:
        settings: every key of it, and no other.
        where: what errors call the place that they came from.
        kind: the class to build.
        **overrides: fields of the config and keywords of the class, instead of what the settings say, or beside it.

    Raises:
        TypeError: for an unknown override.
        ValueError: for settings of something else, or with unknown, missing (`ConfigError`) or wrong ones.
    """
    if not is_saved(settings):
        came = repr(settings.get("architecture")) if settings else "no config.json"
        raise ValueError(f"{where}: architecture: got {came}, allowed is {ARCHITECTURE!r}, as save_pretrained writes")
    if problems := list(key_problems(settings, _KEYS)):
        raise ConfigError(problems, f"config.json of {where}")
    allowed = dict.fromkeys((*CONFIG_FIELDS, *CONSTRUCTOR_FIELDS))
    for key in overrides:
        if key not in allowed:
            raise TypeError(unknown_key(key, allowed))
    dtype = getattr(torch, str(settings["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError([f"dtype: got {settings['dtype']!r}, allowed is a floating dtype's name"], where)
    arguments = {name: settings[name] for name in _ARGUMENTS} | {"dtype": dtype}
    arguments |= {key: value for key, value in overrides.items() if key in CONSTRUCTOR_FIELDS}
    config = EfficientFormerConfig(**{name: settings[name] for name in CONFIG_FIELDS})
    return kind(replace(config, **{k: v for k, v in overrides.items() if k in CONFIG_FIELDS}), **arguments)


def check_unseen(settings: Mapping[str, Any], config: EfficientFormerConfig, given: Container[str]) -> None:
    """Hold a config against what `settings_of` said of weights, in fields that these do not show and nobody gave.

    Raises:
        ValueError: naming such a field, and both values.
    """
    for name in ("act", "bias_resize", "feature_norm") if is_saved(settings) else ():
        if name not in given and (said := settings.get(name)) != getattr(config, name):
            default = getattr(config, name)
            raise ValueError(f"{name}: got {default!r} by default, and the checkpoint has {said!r}: say which")


def name_of(config: EfficientFormerConfig) -> str:
    """The published model that a config is a variant of, by depths and widths; else "efficientformer"."""
    sizes = (config.depths, config.widths)
    return next((name for name, other in PRESETS.items() if (other.depths, other.widths) == sizes), "efficientformer")


def _describe(network: EfficientFormer) -> dict[str, str]:
    state: dict[str, Tensor] = network.state_dict()
    return {key: f"{value.dtype} {list(value.shape)}" for key, value in state.items()}
