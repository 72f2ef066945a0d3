"""Find the weights in a trainer's file: entries, prefixes of names, and the choice among several.

A file may hold weights bare or below entries such as "model" and "state_dict", and several times: as trained, averaged,
of a teacher. Names may carry prefixes of wrappers and of modules around the network. The stem's names show where an
EfficientFormer begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# The first convolution of the stem, in the three namings.
TIMM, ORIGINAL, NETSPRESSO = "stem.conv1.weight", "patch_embed.0.weight", "patch_embed.stem.0.block.conv.weight"
_ANCHORS = (TIMM, ORIGINAL, NETSPRESSO)
# Wrappers of single modules, anywhere in a name: of torch.compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGED = re.compile(r"(?:^|[._-]|(?<=[a-z])(?=[A-Z]))(?:ema|swa|avg|averaged?)\d*(?:$|[._-])", re.IGNORECASE)
_DEPTH, _LISTED = 4, 64  # of entries in entries; longer lists are records


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

    @property
    def rank(self) -> int:
        """0 for averaged weights, 1 for others.

        MMEngine's EMAHook swaps both when it saves: its `ema_state_dict` holds the weights as trained, and a count of
        steps, 2.
        """
        if self.container == "ema_state_dict" and "steps" in self.beside:
            return 2
        return 0 if _AVERAGED.search(self.name) else 1


def find_weights(content: Mapping[Any, Any]) -> list[Weights]:
    """All EfficientFormers' weights in a state dict or in a file's content, in its order."""
    return list(_below(content, ()))


def choose(found: list[Weights], which: str | None = None) -> Weights:
    """The weights to load: averaged ones before others, then the first of the file.

    `which` names them; of several with such a part in their names, the shortest name counts first.

    Raises:
        CheckpointError: where `which` names none of them.
    """
    if which is None:
        return min(found, key=lambda one: one.rank)
    named = [one for one in found if one.named(which)]
    if not named:
        raise CheckpointError(f"which: got {which!r}, allowed are {listed(found)}")
    return min(named, key=lambda one: (one.name.count("."), one.rank))


def listed(found: list[Weights]) -> str:
    return ", ".join(repr(one.name) for one in found)


def no_network(keys: Iterable[object]) -> str:
    """The error for names that belong to no EfficientFormer, or to one in a naming that is not read."""
    some = list(map(str, keys))
    for naming, part in _UNREAD.items():
        if any(part in key for key in some):
            return (
                f"the keys are an EfficientFormer's in the naming of {naming}, which is not read: allowed are files "
                "of timm, the original repository and NetsPresso Trainer"
            )
    return f"the keys belong to no known EfficientFormer (timm, original, NetsPresso): {', '.join(some[:5])}, ..."


# Names of the first convolution elsewhere.
_UNREAD = {"MMPretrain": "patch_embed.0.conv.weight", "transformers": "patch_embed.convolution1.weight"}


def as_tensor(value: object) -> Tensor | None:
    """A tensor, also of a NumPy array of numbers; None for anything else."""
    if isinstance(value, Tensor):
        return value
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    return torch.as_tensor(value) if type(value).__name__ == "ndarray" and kind in "fiub" else None


def as_mapping(value: object) -> Mapping[Any, Any] | None:
    """An entry as a mapping: of a module its state dict, of a list its elements by number; None for anything else."""
    if isinstance(value, nn.Module):
        found: Mapping[Any, Any] = value.state_dict()
        return found
    if isinstance(value, (list, tuple)) and len(value) <= _LISTED:
        return {str(index): one for index, one in enumerate(value)}
    return value if isinstance(value, Mapping) else None


def _below(content: Mapping[Any, Any], path: tuple[str, ...]) -> Iterator[Weights]:
    found = {key: as_tensor(value) for key, value in content.items() if isinstance(key, str)}
    tensors = {key: tensor for key, tensor in found.items() if tensor is not None}
    state: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if (name := without_wrappers(key)) in state:
            raise CheckpointError(f"{key}: another key of the checkpoint is {name!r} too, without its wrapper")
        state[name] = value
    entries = {key: entry for key, value in content.items() if (entry := as_mapping(value)) is not None}
    others = tuple(str(key) for key in content if key not in tensors and key not in entries)
    prefixes = dict.fromkeys(prefix for key in state if (prefix := _prefix(key)) is not None)
    for prefix in prefixes:
        inner = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
        mine = {key for key in state if key.startswith(prefix) and not key.startswith(inner)}
        weights = {key.removeprefix(prefix): value for key, value in state.items() if key in mine}
        beside = (*(key for key in state if key not in mine), *others)
        yield Weights(".".join(path) or None, prefix, weights, beside)
    for key, below in entries.items():
        # Optimizers keep averages of gradients under the weights' names.
        if len(path) < _DEPTH and "optim" not in str(key).lower():
            yield from _below(below, (*path, str(key)))


def tensors_in(content: Mapping[Any, Any], depth: int = _DEPTH) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors at any place in a file's content."""
    for key, value in content.items():
        if (tensor := as_tensor(value)) is not None:
            yield str(key), tensor
        elif depth and (entry := as_mapping(value)) is not None:
            yield from tensors_in(entry, depth - 1)


def without_wrappers(key: str) -> str:
    """A name without those of wrappers around single modules."""
    return _WRAPPERS.sub("", key)


def _prefix(key: str) -> str | None:
    """The part of a name before the stem, None for the name of another part of the network."""
    for anchor in _ANCHORS:
        if key == anchor or key.endswith("." + anchor):
            return key.removesuffix(anchor)
    return None
