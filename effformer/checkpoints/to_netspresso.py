"""State dicts in our naming to NetsPresso Trainer's, the inverse of `formats`."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .formats import NETSPRESSO_BLOCK, CheckpointError, Normalised, layer_scale_to_theirs, mixers, renamed

_TABLE = 49  # entries of the trainer's bias table for each head, of 7x7 offsets
_QKV = ("query", "key", "value")


def to_netspresso(file: Normalised) -> dict[str, Tensor]:
    """The backbone of a checkpoint, as NetsPresso Trainer names it. `without_place` lists the keys that it lacks.

    Feature norms in our own naming are taken for inline ones, as the trainer's are.

    Raises:
        CheckpointError: for the original's dense variant, whose norms do not feed the next stage, and for a bias table
            of other than 7x7 offsets.
    """
    if file.format == "original-dense":
        raise CheckpointError(
            "to: got 'netspresso', where norms feed the next stage; the original's do not: allowed are effformer and "
            "original"
        )
    state = {key: value for key, value in file.state.items() if key not in without_place(file)}
    blocks = {prefix.removesuffix("token_mixer.") for prefix in mixers(state, "attention_biases")}
    return renamed(_separated(state), lambda key: _ours_to_netspresso(key, blocks))


def without_place(file: Normalised) -> list[str]:
    """The keys that NetsPresso's backbone has no place for: those of the classification heads."""
    return [key for key in file.state if re.match(r"head(_dist)?\.", key)]


def _ours_to_netspresso(key: str, attention_blocks: set[str]) -> str:
    """Their key. `attention_blocks` are prefixes "stages.N.blocks.M.": their MLPs have linear layers."""
    if match := re.fullmatch(r"stem\.(conv|norm)([12])\.(\w+)", key):
        return f"patch_embed.stem.{int(match[2]) - 1}.block.{match[1]}.{match[3]}"
    if match := re.fullmatch(r"(stages\.(\d)\.blocks\.(\d+)\.)(.+)", key):
        name = layer_scale_to_theirs(match[4])
        for theirs, ours in NETSPRESSO_BLOCK.items():
            if name.startswith(ours) and ("conv_1x1" in theirs) != (match[1] in attention_blocks):
                name = theirs + name.removeprefix(ours)
                break
        return f"encoder.blocks.{2 * int(match[2])}.{match[3]}.{name}"
    if match := re.fullmatch(r"stages\.(\d)\.downsample\.(conv|norm)\.(\w+)", key):
        return f"encoder.blocks.{2 * int(match[1]) - 1}.proj.block.{match[2]}.{match[3]}"
    if match := re.fullmatch(r"feature_norms\.(\d)\.(\w+)", key):
        return f"encoder.norm{2 * int(match[1])}.{match[2]}"
    return key


def _separated(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """qkv, whose channels are q | k | v for each head -> query, key, value."""
    separated = dict(state)
    for prefix in mixers(state, "attention_biases"):
        heads, entries = state[prefix + "attention_biases"].shape
        if entries != _TABLE:
            raise CheckpointError(
                f"{prefix}attention_biases: got {entries} offsets, allowed in NetsPresso are {_TABLE}"
            )
        absent = [name for name in ("qkv.weight", "qkv.bias", "proj.weight") if prefix + name not in state]
        if absent:
            raise CheckpointError(f"{prefix}: query, key, value cannot be separated without {', '.join(absent)}")
        values = state[prefix + "proj.weight"].shape[1] // heads
        for kind in ("weight", "bias"):
            by_head = separated.pop(f"{prefix}qkv.{kind}").unflatten(0, (heads, -1))
            keys = (by_head.shape[1] - values) // 2
            parts = torch.split(by_head, [keys, keys, values], dim=1)
            separated |= {f"{prefix}{name}.{kind}": part.flatten(0, 1) for name, part in zip(_QKV, parts, strict=True)}
    return separated
