"""The `config.json` beside a saved network's weights, and the network rebuilt from it."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import asdict, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..checks import key_problems, unknown_key
from ..config import CONFIG_FIELDS, PRESETS, ConfigError, EfficientFormerConfig
from ..model.network import CONSTRUCTOR_FIELDS, EfficientFormer

ARCHITECTURE = "effformer.EfficientFormer"
_ARGUMENTS = ("in_chans", "num_classes", "global_pool", "drop_rate", "drop_path_rate")
_KEYS = ("architecture", *CONFIG_FIELDS, *_ARGUMENTS, "dtype")

Network = TypeVar("Network", bound=EfficientFormer)


def settings_of(network: EfficientFormer) -> dict[str, Any]:
    """Everything that rebuilds the network but its weights: the config, and arguments of the constructor.

    Backend, device and modes are chosen anew for each run, and not saved.

    Raises:
        ValueError: for a network that was pruned, whose modules were replaced, or with parameters of several dtypes.
    """
    settings = {"architecture": ARCHITECTURE, **asdict(network.config)}
    settings |= {name: getattr(network, name) for name in _ARGUMENTS}
    settings["dtype"] = str(network.stem.conv1.weight.dtype).removeprefix("torch.")
    found, expected = _describe(network), _describe(rebuild(settings, "the network", EfficientFormer, device="meta"))
    if different := sorted(found.items() ^ expected.items()):
        raise ValueError(f"network: {different[0][0]} does not fit the config: pruned, replaced, other dtype?")
    return settings


def is_saved(settings: Mapping[str, Any]) -> bool:
    """Whether `settings_of` wrote this."""
    return settings.get("architecture") == ARCHITECTURE


def rebuild(settings: Mapping[str, Any], where: str, kind: type[Network], **overrides: Any) -> Network:
    """Build a network with random weights from the result of `settings_of`.

    Args:
        settings: every key of it, and no other.
        where: their place, for errors.
        kind: the class to build.
        **overrides: fields of the config and keywords of the class, which replace or complete the settings.

    Raises:
        TypeError: for an unknown override.
        ValueError: for other settings, or with unknown, missing (`ConfigError`) or wrong ones.
    """
    config, arguments = _read(settings, where)
    allowed = dict.fromkeys((*CONFIG_FIELDS, *CONSTRUCTOR_FIELDS))
    for key in overrides:
        if key not in allowed:
            raise TypeError(unknown_key(key, allowed))
    arguments |= {key: value for key, value in overrides.items() if key in CONSTRUCTOR_FIELDS}
    return kind(replace(config, **{k: v for k, v in overrides.items() if k in CONFIG_FIELDS}), **arguments)


def keywords_of(settings: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """Name and keywords of `create_model` for the network of `settings_of`; errors are those of `rebuild`."""
    config, arguments = _read(settings, where)
    name = name_of(config)
    name = name if name in PRESETS else next(iter(PRESETS))
    published = asdict(PRESETS[name])
    return name, {key: value for key, value in asdict(config).items() if value != published[key]} | arguments


def _read(settings: Mapping[str, Any], where: str) -> tuple[EfficientFormerConfig, dict[str, Any]]:
    """Config and keywords of the constructor."""
    if not is_saved(settings):
        came = repr(settings.get("architecture")) if settings else "no config.json"
        raise ValueError(f"{where}: architecture: got {came}, allowed is {ARCHITECTURE!r}, as save_pretrained writes")
    if problems := list(key_problems(settings, _KEYS)):
        raise ConfigError(problems, f"config.json of {where}")
    dtype = getattr(torch, str(settings["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError([f"dtype: got {settings['dtype']!r}, allowed is a floating dtype's name"], where)
    config = EfficientFormerConfig(**{name: settings[name] for name in CONFIG_FIELDS})
    return config, {name: settings[name] for name in _ARGUMENTS} | {"dtype": dtype}


def check_unseen(settings: Mapping[str, Any], config: EfficientFormerConfig, given: Container[str]) -> None:
    """Compare a config with saved settings, in fields that weights do not show and the caller did not give.

    Raises:
        ValueError: naming such a field, and both values.
    """
    for name in ("act", "bias_resize", "feature_norm") if is_saved(settings) else ():
        if name not in given and (said := settings.get(name)) != getattr(config, name):
            default = getattr(config, name)
            raise ValueError(f"{name}: got {default!r} by default, and the checkpoint has {said!r}: say which")


def name_of(config: EfficientFormerConfig) -> str:
    """The published model with the depths and widths of a config; "efficientformer" where there is none."""
    sizes = (config.depths, config.widths)
    return next((name for name, other in PRESETS.items() if (other.depths, other.widths) == sizes), "efficientformer")


def _describe(network: EfficientFormer) -> dict[str, str]:
    state: dict[str, Tensor] = network.state_dict()
    return {key: f"{value.dtype} {list(value.shape)}" for key, value in state.items()}
