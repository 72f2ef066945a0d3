"""Find the weights in what a trainer saved: entries of a file, prefixes of names, and the choice among several.

A file may hold weights bare or below entries such as "model" and "state_dict", and several times: as trained, averaged,
of a teacher. Names may carry prefixes of wrappers and of modules around the network. The stem's names show where an
EfficientFormer begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

# The first convolution of the stem, in the three namings.
TIMM, ORIGINAL, NETSPRESSO = "stem.conv1.weight", "patch_embed.0.weight", "patch_embed.stem.0.block.conv.weight"
_ANCHORS = (TIMM, ORIGINAL, NETSPRESSO)
# Wrappers of single modules, anywhere in a name: of torch.compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGED = re.compile(r"(^|[._-])(ema|swa|avg|average|averaged)\d*($|[._-])")
_DEPTH = 4  # of entries in entries


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, is not an EfficientFormer's, or does not fit the network."""


class Weights(NamedTuple):
    """The weights of one network in a file.

    Attributes:
        container: the entry that holds them, as "model" or "ema.module"; None if the file was the weights.
        prefix: of their names, as "module.backbone."; "" without one.
        state: the weights without prefix.
        beside: other keys in the same entry.
    """

    container: str | None
    prefix: str
    state: dict[str, Tensor]
    beside: tuple[str, ...]

    @property
    def name(self) -> str:
        """Container and prefix, as "state_dict.teacher"; "" for bare weights."""
        return ".".join(part for part in (self.container or "", self.prefix.removesuffix(".")) if part)

    def named(self, which: str) -> bool:
        """Whether `which` is its name, or consecutive parts of it."""
        return f".{which}." in f".{self.name}."


def find_weights(content: Mapping[Any, Any]) -> list[Weights]:
    """All EfficientFormers' weights in a state dict or in a file's content, in its order."""
    return list(_below(content, ()))


def choose(found: list[Weights], which: str | None = None) -> Weights:
    """The weights to load: those that `which` names, averaged ones before others, then in the file's order.

    Raises:
        CheckpointError: where `which` names none of them.
    """
    named = [one for one in found if which is None or one.named(which)]
    if not named:
        raise CheckpointError(f"which: got {which!r}, allowed are {listed(found)}")
    return min(named, key=lambda one: _AVERAGED.search(one.name.lower()) is None)


def listed(found: list[Weights]) -> str:
    return ", ".join(repr(one.name) for one in found)


def _below(content: Mapping[Any, Any], path: tuple[str, ...]) -> Iterator[Weights]:
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    state: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if (name := _WRAPPERS.sub("", key)) in state:
            raise CheckpointError(f"{key}: another key of the checkpoint is {name!r} too, without its wrapper")
        state[name] = value
    others = tuple(str(key) for key in content if key not in tensors and not isinstance(content[key], Mapping))
    prefixes = dict.fromkeys(prefix for key in state if (prefix := _prefix(key)) is not None)
    for prefix in prefixes:
        inner = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
        mine = {key for key in state if key.startswith(prefix) and not key.startswith(inner)}
        weights = {key.removeprefix(prefix): value for key, value in state.items() if key in mine}
        beside = (*(key for key in state if key not in mine), *others)
        yield Weights(".".join(path) or None, prefix, weights, beside)
    for key, value in content.items():
        # Optimizers keep averages of gradients under the weights' names.
        if isinstance(value, Mapping) and len(path) < _DEPTH and "optim" not in str(key).lower():
            yield from _below(value, (*path, str(key)))


def _prefix(key: str) -> str | None:
    """The part of a name before the stem, None for the name of another part of the network."""
    for anchor in _ANCHORS:
        if key == anchor or key.endswith("." + anchor):
            return key.removesuffix(anchor)
    return None
