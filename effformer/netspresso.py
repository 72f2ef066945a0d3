"""Our backbone in NetsPresso Trainer, in place of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .checkpoints.formats import normalise
from .model.netspresso import Backbone, build_backbone


def efficientformer(task: str, conf_model_backbone: Mapping[str, Any]) -> Backbone:
    """Build the backbone, with the arguments that the trainer gives to its own `efficientformer`.

    The trainer's own weights load into it with `load_state_dict`, alone or as part of a trainer's model; q, k and v are
    interleaved then. Saved files have our keys, and load again.

    Args:
        task: the trainer's `model.task`.
        conf_model_backbone: its `model.architecture.backbone`, a mapping or an OmegaConf node.

    Raises:
        ConfigError: (a ValueError) as `effformer.build_backbone`.

    Source: models/builder.py of NetsPresso Trainer 1.4.1, `load_backbone_and_head_model`.
    """
    backbone = build_backbone({**conf_model_backbone, "name": "efficientformer"}, task)  # under any registered name
    backbone.register_load_state_dict_pre_hook(_take_the_trainers_keys)  # type: ignore[no-untyped-call]
    return backbone


def register(name: str = "efficientformer") -> None:
    """Put `efficientformer` into the trainer's registry under `name`, by default in place of its own.

    Raises:
        ImportError: where NetsPresso Trainer is not installed.
    """
    try:
        from netspresso_trainer.models.registry import MODEL_BACKBONE_DICT
    except ImportError as error:
        raise ImportError(
            "effformer.netspresso: NetsPresso Trainer is not installed: pip install netspresso-trainer"
        ) from error
    MODEL_BACKBONE_DICT[name] = efficientformer


def _take_the_trainers_keys(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    theirs = {key.removeprefix(prefix): key for key in state if key.startswith(prefix)}
    if "patch_embed.stem.0.block.conv.weight" in theirs:
        ours = normalise({name: state.pop(key) for name, key in theirs.items()}).state
        state.update({f"{prefix}network.{name}": value for name, value in ours.items()})
