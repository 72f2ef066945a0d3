"""State dicts of timm, the original repository and NetsPresso Trainer, to our naming and back.

Our naming is timm's, with `feature_norms.N` added for the dense variants. Stage i of the network is entry 2i of the
original's list, and the downsampling before it is entry 2i - 1. Blocks are counted alike everywhere, `Flat` included.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..checks import check_choice
from ..model.bias_buffer import is_rounded, why_unusable
from ..reference import bias_index
from .contents import NETSPRESSO, ORIGINAL, TIMM, choose, find_weights, no_network
from .contents import CheckpointError as CheckpointError

Format = Literal["timm", "original", "original-dense", "netspresso"]
TARGETS = ("effformer", "timm", "original", "netspresso")


class Normalised(NamedTuple):
    """A checkpoint in our naming.

    `state` has an `attention_bias_idxs` for every bias table, also where the file had none. `ignored` lists the file's
    keys that have no place in it, `recomputed` says which derived buffers were damaged.
    """

    state: dict[str, Tensor]
    format: Format
    ignored: tuple[str, ...]
    recomputed: tuple[str, ...] = ()

    @property
    def dense(self) -> bool:
        """Whether it has norms of the feature maps."""
        return any(key.startswith("feature_norms.") for key in self.state)

    def settings(self) -> dict[str, Any]:
        """The fields of `EfficientFormerConfig` that its format decides: bias_resize and feature_norm, or neither."""
        match self.format:
            case "netspresso":
                return {"bias_resize": "matrix-bilinear", "feature_norm": "inline" if self.dense else None}
            case "original-dense":
                return {"bias_resize": "matrix-bicubic", "feature_norm": "tap"}
        return {}


def normalise(state: Mapping[str, Tensor]) -> Normalised:
    """Find out a state dict's format and convert it to our naming. Unknown keys stay as they are.

    Prefixes are left out, see `contents`. Damaged derived buffers are computed anew.

    Raises:
        CheckpointError: for a state dict of another network, a bias index that is not the standard one, or q, k, v
            that do not belong together.
    """
    found = find_weights(state)
    if not found:
        raise CheckpointError(no_network(state))
    state, ignored = choose(found)[2:]
    format = _detect(state)
    dead: list[str] = []
    match format:
        case "timm":
            converted = dict(state)
        case "original":
            converted = renamed(state, _original_to_ours)
        case "original-dense":
            if any(key.endswith("attention_biases_seg") for key in state):
                dead = [key for key in state if key.endswith(("attention_biases", "attention_bias_idxs"))]
            live = {key.removesuffix("_seg"): value for key, value in state.items() if key not in dead}
            converted = renamed(live, _original_to_ours)
        case "netspresso":
            converted = renamed(_interleave(_constant_bias_as_zero(state)), _netspresso_to_ours)
    return Normalised(converted, format, (*ignored, *dead), (*_standard_indices(converted), *_counters(converted)))


def convert_state_dict(state: Mapping[str, Tensor], to: str) -> dict[str, Tensor]:
    """A checkpoint of any known format in the naming `to`: "effformer", "timm", "original" or "netspresso".

    The result is complete for a strict load: derived buffers are filled in. Two settings are not in the names, and the
    caller chooses them: whether `feature_norms` are tapped or inline, and how the bias is resized.

    Raises:
        CheckpointError: as `normalise`, or for feature norms that have no place in `to`.
        ValueError: for another `to`.
    """
    check_choice("to", to, TARGETS)
    file = normalise(state)
    if to == "netspresso":
        from .to_netspresso import to_netspresso

        return to_netspresso(file)
    ours, dense = file.state, file.dense
    if dense and to == "timm":
        raise CheckpointError("to: got 'timm', which has no feature norms; allowed are effformer, original")
    if to != "original":
        return ours
    if dense and file.format == "netspresso":
        raise CheckpointError(
            "to: got 'original', where norms do not feed the next stage; NetsPresso's do: allowed is effformer"
        )
    converted = renamed(ours, _ours_to_original)
    return _add_dead_buffers(converted) if dense else converted


def _detect(state: Mapping[str, Tensor]) -> Format:
    if TIMM in state:
        return "timm"
    if NETSPRESSO in state:
        return "netspresso"
    assert ORIGINAL in state
    dense = any(key.endswith("attention_biases_seg") for key in state) or "norm0.weight" in state
    return "original-dense" if dense else "original"


def renamed(state: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if (name := rename(key)) in renamed:
            raise CheckpointError(f"{key}: another key of the checkpoint becomes {name!r} too")
        renamed[name] = value
    return renamed


# --- names ----------------------------------------------------------------------------------------------------------

_ORIGINAL_STEM = {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2"}
NETSPRESSO_BLOCK = {
    "channel_mlp.ffn.conv_1x1_1.block.conv.": "mlp.fc1.",
    "channel_mlp.ffn.conv_1x1_1.block.norm.": "mlp.norm1.",
    "channel_mlp.ffn.conv_1x1_1.block.act.": "mlp.act.",
    "channel_mlp.ffn.conv_1x1_2.block.conv.": "mlp.fc2.",
    "channel_mlp.ffn.conv_1x1_2.block.norm.": "mlp.norm2.",
    "channel_mlp.ffn.dense1.": "mlp.fc1.",
    "channel_mlp.ffn.act.": "mlp.act.",
    "channel_mlp.ffn.dense2.": "mlp.fc2.",
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
    "token_mixer.linear.": "token_mixer.proj.",
}


def _original_to_ours(key: str) -> str:
    if match := re.fullmatch(r"patch_embed\.([0134])\.(\w+)", key):
        return f"stem.{_ORIGINAL_STEM[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"network\.([0246])\.(\d+)\.(.+)", key):
        return f"stages.{int(match[1]) // 2}.blocks.{match[2]}.{_layer_scale_to_ours(match[3])}"
    if match := re.fullmatch(r"network\.([135])\.(proj|norm)\.(\w+)", key):
        return f"stages.{(int(match[1]) + 1) // 2}.downsample.{match[2].replace('proj', 'conv')}.{match[3]}"
    if match := re.fullmatch(r"norm([0246])\.(\w+)", key):
        return f"feature_norms.{int(match[1]) // 2}.{match[2]}"
    return re.sub(r"^dist_head\.", "head_dist.", key)


def _ours_to_original(key: str) -> str:
    if match := re.fullmatch(r"stem\.((?:conv|norm)[12])\.(\w+)", key):
        position = {name: position for position, name in _ORIGINAL_STEM.items()}[match[1]]
        return f"patch_embed.{position}.{match[2]}"
    if match := re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.(.+)", key):
        return f"network.{2 * int(match[1])}.{match[2]}.{layer_scale_to_theirs(match[3])}"
    if match := re.fullmatch(r"stages\.(\d)\.downsample\.(conv|norm)\.(\w+)", key):
        return f"network.{2 * int(match[1]) - 1}.{match[2].replace('conv', 'proj')}.{match[3]}"
    if match := re.fullmatch(r"feature_norms\.(\d)\.(\w+)", key):
        return f"norm{2 * int(match[1])}.{match[2]}"
    return re.sub(r"^head_dist\.", "dist_head.", key)


def _netspresso_to_ours(key: str) -> str:
    if match := re.fullmatch(r"patch_embed\.stem\.([01])\.block\.(conv|norm)\.(\w+)", key):
        return f"stem.{match[2]}{int(match[1]) + 1}.{match[3]}"
    if match := re.fullmatch(r"encoder\.blocks\.([0246])\.(\d+)\.(.+)", key):
        name = _layer_scale_to_ours(match[3])
        for theirs, ours in NETSPRESSO_BLOCK.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                break
        return f"stages.{int(match[1]) // 2}.blocks.{match[2]}.{name}"
    if match := re.fullmatch(r"encoder\.blocks\.([135])\.proj\.block\.(conv|norm)\.(\w+)", key):
        return f"stages.{(int(match[1]) + 1) // 2}.downsample.{match[2]}.{match[3]}"
    if match := re.fullmatch(r"encoder\.norm([0246])\.(\w+)", key):
        return f"feature_norms.{int(match[1]) // 2}.{match[2]}"
    return key


def our_path(path: str, format: Format) -> str:
    """Our path of a module, from its path in a network of that format; unknown paths stay as they are."""
    rename = {"original": _original_to_ours, "original-dense": _original_to_ours, "netspresso": _netspresso_to_ours}
    return path if format == "timm" else rename[format](f"{path}.weight").removesuffix(".weight")


def _layer_scale_to_ours(name: str) -> str:
    return re.sub(r"^layer_scale_([12])$", r"ls\1.gamma", name)


def layer_scale_to_theirs(name: str) -> str:
    """A name within a block, with the layer scales named as by the original and NetsPresso."""
    return re.sub(r"^ls([12])\.gamma$", r"layer_scale_\1", name)


# --- attention ------------------------------------------------------------------------------------------------------


def mixers(state: Mapping[str, Tensor], suffix: str) -> Iterable[str]:
    """Prefixes `stages.N.blocks.M.token_mixer.` of the keys that end in `suffix`."""
    return [key.removesuffix(suffix) for key in state if key.endswith("token_mixer." + suffix)]


def _standard_indices(state: dict[str, Tensor]) -> Iterator[str]:
    """Give each bias table its index buffer; refuse one of another network. Yields remarks on damaged ones."""
    for prefix in mixers(state, "attention_biases"):
        table, key = state[prefix + "attention_biases"], prefix + "attention_bias_idxs"
        resolution = math.isqrt(table.shape[-1]) if table.ndim == 2 else 0
        if table.ndim != 2 or resolution**2 != table.shape[1]:
            raise CheckpointError(f"{prefix}attention_biases: got {list(table.shape)}, allowed is [heads, T * T]")
        standard = bias_index(resolution, resolution, torch.device("cpu"))
        if (found := state.get(key)) is not None and not found.is_meta:
            if problem := why_unusable(found, resolution):
                raise CheckpointError(f"{key}: {problem}")
            if is_rounded(found, resolution) and not torch.equal(found.cpu().double(), standard.double()):
                yield f"{key}: rounded by an average or a low precision, the standard index is used"
            elif found.dtype != standard.dtype:
                yield f"{key}: {found.dtype} -> {standard.dtype}".replace("torch.", "")
        state[key] = standard


def _counters(state: dict[str, Tensor]) -> Iterator[str]:
    """Make every BatchNorm's counter of batches an int64 scalar. Yields remarks on those that were not."""
    odd: dict[str, int] = {}
    for key, value in state.items():
        is_right = (value.dtype, value.shape) == (torch.int64, ()) or value.is_meta
        if key.endswith("num_batches_tracked") and not is_right and value.numel() == 1:
            count = value.double().item()
            state[key] = torch.tensor(round(count) if 0 <= count < 2**53 else 0)
            kind = str(value.dtype).removeprefix("torch.") + (f" {list(value.shape)}" if value.ndim else "")
            odd[kind] = odd.get(kind, 0) + 1
    for kind, number in odd.items():
        yield f"num_batches_tracked of {number} norms: {kind} -> int64"


def _constant_bias_as_zero(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace tables under a constant index by zeros.

    NetsPresso's index is all ones until a checkpoint brings the real one. The bias is then one constant for each head,
    which softmax cancels.
    """
    state = dict(state)
    for prefix in mixers(state, "attention_bias_idxs"):
        index, table = state[prefix + "attention_bias_idxs"], state.get(prefix + "attention_biases")
        if table is None or index.numel() < 2 or not bool((index == index.flatten()[0]).all()):
            continue
        warnings.warn(
            f"{prefix}attention_bias_idxs is constant: this network was trained without an attention bias; it gets "
            "a bias table of zeros, which computes the same",
            stacklevel=4,
        )
        state[prefix + "attention_biases"] = torch.zeros_like(table)
        del state[prefix + "attention_bias_idxs"]
    return state


def _interleave(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """NetsPresso's query, key, value -> qkv, whose channels are q | k | v for each head."""
    state = dict(state)
    for kind in ("weight", "bias"):
        for prefix in mixers(state, f"query.{kind}"):
            names = [f"{prefix}{part}.{kind}" for part in ("query", "key", "value")]
            absent = [name for name in (*names, prefix + "attention_biases") if name not in state]
            if absent:
                raise CheckpointError(f"{prefix}: query, key, value cannot be joined without {', '.join(absent)}")
            heads = state[prefix + "attention_biases"].shape[0]
            parts = [state.pop(name) for name in names]
            if any(part.shape[0] % heads for part in parts):
                shapes = ", ".join(str(list(part.shape)) for part in parts)
                raise CheckpointError(f"{prefix}: query, key, value of {shapes} do not divide into {heads} heads")
            by_head = [part.unflatten(0, (heads, -1)) for part in parts]
            state[f"{prefix}qkv.{kind}"] = torch.cat(by_head, dim=1).flatten(0, 1)
    return state


def _add_dead_buffers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the table as in the original's dense variant, and add the classification table.

    The original never reads the second one, but a strict load asks for it.
    """
    dense = {re.sub(r"(attention_biases|attention_bias_idxs)$", r"\1_seg", key): value for key, value in state.items()}
    for prefix in mixers(state, "attention_biases"):
        table = state[prefix + "attention_biases"]
        dense[prefix + "attention_biases"] = torch.zeros(table.shape[0], 49, dtype=table.dtype)
        dense[prefix + "attention_bias_idxs"] = torch.ones(49, 49, dtype=torch.int64)
    return dense
