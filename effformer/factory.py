"""Networks by name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from .checkpoints import config_file as saved
from .checkpoints import hub
from .checkpoints.load import load_checkpoint
from .checks import unknown_key, wrong
from .config import CONFIG_FIELDS, PRESETS, PUBLISHED_INPUT, preset
from .model.network import CONSTRUCTOR_FIELDS, EfficientFormer

_ARGUMENTS = ("num_classes", "in_chans", "pretrained", "checkpoint", "reset_head", "which", "backend")
_log = logging.getLogger("effformer")


def list_models(pattern: str | Sequence[str] = "*", pretrained: bool = False) -> list[str]:
    """The names that `create_model` takes, smallest network first.

    Args:
        pattern: a shell pattern, such as "*_l[13]", or several, of which one must match. As in timm, a pattern must
            match the whole name, one that matches no name gives an empty list, and "" and [] stand for all names.
        pretrained: list only models with published weights.

    Raises:
        TypeError: for a pattern that is not text, and a `pretrained` that is not a bool.
    """
    patterns = [pattern] if pattern and isinstance(pattern, str) else pattern
    if not isinstance(patterns, Sequence) or not all(isinstance(one, str) for one in patterns):
        raise TypeError(wrong("pattern", pattern, "a string, or several"))
    if not isinstance(pretrained, bool):
        raise TypeError(wrong("pretrained", pretrained, "True or False"))
    names = [name for name in PRESETS if name in hub.PRETRAINED or not pretrained]
    return [name for name in names if any(fnmatchcase(name, one) for one in patterns or "*")]


def pretrained_cfg(name: str) -> dict[str, Any]:
    """Describe a published model for timm's tools: preprocessing, hub id, first convolution and heads."""
    return {
        "architecture": name,
        "url": "",
        "hf_hub_id": hub.PRETRAINED.get(name),
        "num_classes": 1000,
        "input_size": (3, *PUBLISHED_INPUT["size"]),
        "min_input_size": (3, 32, 32),
        "pool_size": None,
        "fixed_input_size": False,
        **{key: value for key, value in PUBLISHED_INPUT.items() if key != "size"},
        "first_conv": "stem.conv1",
        "classifier": ("head", "head_dist"),
        "license": "apache-2.0",
    }


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    pretrained: bool = False,
    checkpoint: str | None = None,
    reset_head: bool = False,
    which: str | None = None,
    backend: str = "auto",
    **overrides: Any,
) -> EfficientFormer:
    """Create a published EfficientFormer, with random weights unless a checkpoint is asked for.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of both heads; 0 for none.
        in_chans: channels of the images.
        pretrained: load timm's ImageNet-1k weights of this model (needs the extra `hub`, and downloads).
        checkpoint: a file, a folder or a hub id "owner/name" to load instead, see `hub.locate` and `load_checkpoint`.
        reset_head: keep freshly initialised heads where the checkpoint has none that fit.
        which: the weights to take from a checkpoint that holds several, as for `load_checkpoint`.
        backend: "auto", "eager" or "triton", see `effformer.ops`.
        **overrides: fields of `EfficientFormerConfig` and keywords of `EfficientFormer`.

    Returns:
        the network in training mode, as every new torch module is. Its `pretrained_cfg` is timm's: so
        `timm.data.resolve_model_data_config` gives the preprocessing of the published weights.

    Raises:
        TypeError: for an unknown keyword.
        ValueError: for a wrong value, naming it. Also where the checkpoint's `config.json`, as save_pretrained writes
            it, differs from the default of a field that weights do not show, and no override decides.
        CheckpointError: (a RuntimeError) where the checkpoint does not fit.
        OSError, ImportError: where it cannot be read or downloaded.
    """
    config = preset(name)
    allowed = dict.fromkeys((*_ARGUMENTS, *CONFIG_FIELDS, *CONSTRUCTOR_FIELDS))
    for key in overrides:
        if key not in allowed:
            raise TypeError(f"create_model: {unknown_key(key, allowed)}")
    if "proj_drop" in overrides and "proj_drop_rate" in overrides:
        raise TypeError("create_model: proj_drop and proj_drop_rate are two names of one thing, allowed is one of them")
    if not isinstance(pretrained, bool):
        raise TypeError(f"pretrained: got {pretrained!r}, allowed are True and False (checkpoint names other weights)")
    if pretrained and checkpoint is not None:
        raise ValueError(f"checkpoint: got {checkpoint!r} with pretrained=True, allowed is one of the two")
    config = replace(config, **{key: value for key, value in overrides.items() if key in CONFIG_FIELDS})
    network = EfficientFormer(
        config,
        num_classes=num_classes,
        in_chans=in_chans,
        backend=backend,
        **{key: value for key, value in overrides.items() if key not in CONFIG_FIELDS},
    )
    network.pretrained_cfg = network.default_cfg = pretrained_cfg(name)
    if checkpoint is not None:
        saved.check_unseen(hub.read_config_if_there(checkpoint), config, overrides)
    if pretrained:
        checkpoint = hub.PRETRAINED[name]
    if checkpoint is not None:
        report = load_checkpoint(network, hub.locate(checkpoint), reset_head=reset_head, which=which)
        _log.info("%s: %s", checkpoint, report)
    elif reset_head:
        raise ValueError("reset_head: got True without a checkpoint, allowed is False")
    elif which is not None:
        raise ValueError(f"which: got {which!r} without a checkpoint, allowed is None")
    return network
