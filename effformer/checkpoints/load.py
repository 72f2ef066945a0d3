"""Checkpoints: read them, find out which network they hold, load them strictly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import PRESETS
from ..model.netspresso import network_within
from ..model.network import EfficientFormer, init_linear
from ..model.wrappers import class_of, remedy
from . import config_file, hub
from .contents import CheckpointError, without_wrappers
from .formats import Normalised, normalise
from .read import read_weights

# Any file may leave these out: they follow from the architecture, or only count steps of training.
_OPTIONAL = ("attention_bias_idxs", "num_batches_tracked")
_HEADS = ("head", "head_dist")


@dataclass(frozen=True)
class CheckpointReport:
    """The outcome of `load_checkpoint`.

    Attributes:
        format: "timm", "original", "original-dense" or "netspresso".
        ignored: keys of the file that have no place in the network and were not loaded: heads for a network without
            any, keys beside the network's prefix, unused buffers.
        reinitialised: parameters of the network that the file lacks and that were initialised anew.
        missing, unexpected: keys of the network or of the file alone (always empty with strict=True).
        cast: dtypes that were converted, as "float64 -> float32".
        container: the entry of the file that held the weights, as "model" or "ema.module"; None if the file was the
            weights.
        prefix: of the weights' names in the file, as "module."; "" without one.
        recomputed: remarks on derived buffers that were damaged, and what replaced them.
        others: names of further sets of weights in the file, which `which` takes.
    """

    format: str
    ignored: tuple[str, ...] = ()
    reinitialised: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()
    container: str | None = None
    prefix: str = ""
    recomputed: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


class _Comparison(NamedTuple):
    """The differences between a converted state dict and a network's."""

    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]
    cast: set[str]


def load_checkpoint(
    model: nn.Module,
    source: str | Path | Mapping[str, Any] | nn.Module,
    strict: bool = True,
    *,
    reset_head: bool = False,
    which: str | None = None,
) -> CheckpointReport:
    """Load a checkpoint of timm, the original repository (classification or dense) or NetsPresso Trainer.

    The keys show the format; NetsPresso's separate q, k, v are interleaved. Nothing is loaded unless all of it fits.
    A dense original file has no final norm: that of the network is reset.

    Args:
        model: an `EfficientFormer`, or a `Backbone` of `build_backbone`.
        source: a safetensors or torch file of any trainer (read with weights_only=True), a folder with one (see
            `hub.locate`), or a file's content: weights bare or below any entries ("model", "state_dict", "ema.module"),
            their names with or without a prefix ("module.", "model.backbone."). Other entries do not matter. A module
            counts as its state dict.
        strict: with False, missing and unexpected keys are reported instead of refused.
        reset_head: initialise both heads anew where the file has none, or has them for another number of classes.
        which: the weights to take where the file has several, by entry or prefix: "model", "teacher", "ema.module".
            By default averaged weights (ema, swa, avg in the name) come before others, then the file's order counts;
            see `contents`.

    Returns:
        a `CheckpointReport`.

    Raises:
        CheckpointError: (a RuntimeError) listing every missing, unexpected and mis-shaped key, or the reason why the
            file is not a checkpoint of this network.
        OSError: where the file cannot be read.
        TypeError: for another library's model, or another source.
    """
    network = network_within(model)
    if any(parameter.is_meta for parameter in network.parameters()):
        raise ValueError("model: got parameters on the meta device, allowed is a model with storage: use to_empty()")

    if isinstance(source, (str, Path)) and Path(source).is_dir():
        source = hub.locate(source)
    weights, others = read_weights(source, which)
    file = normalise(weights.state)
    fresh = _fresh_modules(network, file, reset_head)
    absent_heads = [name for name in _HEADS if isinstance(getattr(network, name), (nn.Identity, NoneType))]
    homeless = [key for key in file.state if key.rpartition(".")[0] in absent_heads]
    kept = {key: value for key, value in file.state.items() if key.rpartition(".")[0] not in {*fresh, *absent_heads}}

    _share_one_head(network, kept)
    reinitialised = [f"{name}.{key}" for name in fresh for key, _ in network.get_submodule(name).named_parameters()]
    # Parts of the network may be wrapped, such as by torch.compile.
    state = network.state_dict()
    names = {without_wrappers(key): key for key in state}
    comparison = _compare(kept, {name: state[key] for name, key in names.items()}, reinitialised)
    if comparison.mismatched or (strict and (comparison.missing or comparison.unexpected)):
        complaint = _complaint(file.format, comparison, strict, network)
        if others:
            taken = f"{weights.name!r} was taken" if weights.name else "the file's own weights were taken"
            complaint += f"\n{taken}; which= takes one of {', '.join(map(repr, others))}"
        raise CheckpointError(complaint)

    # Counters of a norm that the network does not have as BatchNorm, such as a frozen one.
    unused = [key for key in kept if key not in names and key.endswith(_OPTIONAL)]
    known = {names[key]: value for key, value in kept.items() if key in names}
    network.load_state_dict(known, strict=False)
    for module in fresh.values():
        init_linear(module) if isinstance(module, nn.Linear) else module.reset_parameters()  # type: ignore[operator]
    return CheckpointReport(
        format=file.format,
        ignored=(*weights.beside, *file.ignored, *homeless, *unused),
        reinitialised=tuple(reinitialised),
        missing=tuple(comparison.missing),
        unexpected=tuple(comparison.unexpected),
        cast=tuple(sorted(comparison.cast)),
        container=weights.container,
        prefix=weights.prefix,
        recomputed=file.recomputed,
        others=others,
    )


def network_of(checkpoint: str | Path | Mapping[str, Any], which: str | None = None) -> tuple[str, dict[str, Any]]:
    """Find out which network a checkpoint holds: the name and the keywords for `create_model`.

    A `config.json` as `save_pretrained` writes it decides; otherwise the keys and shapes of the weights do, which show
    neither the activation nor the drop rates.

    Args:
        checkpoint: a file, a folder or a hub id, as for `hub.locate`; or a state dict, as for `load_checkpoint`.
        which: as for `load_checkpoint`.

    Raises:
        CheckpointError: (a RuntimeError) for a file without weights, or with weights of no published model.
        ValueError: for a `config.json` with unknown, missing or wrong keys.
        OSError, ImportError: where the checkpoint cannot be read or downloaded.
    """
    if not isinstance(checkpoint, Mapping):
        saved = hub.read_config_if_there(checkpoint)
        if config_file.is_saved(saved):
            return config_file.keywords_of(saved, str(checkpoint))
        checkpoint = hub.locate(checkpoint)
    return settings_for(read_weights(checkpoint, which)[0].state)


def settings_for(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Name and keywords of `create_model` for the network of a state dict, from its keys and shapes.

    A file with only one head gets a network without heads, since a mean with a random head would be useless.

    Raises:
        CheckpointError: as `normalise`; for widths of no published model; for feature norms in our own naming, which
            does not show whether they are tapped or inline.
    """
    file = normalise(state)
    downsamples = [file.state.get(f"stages.{index}.downsample.conv.weight") for index in (1, 2, 3)]
    convolutions = [file.state.get("stem.conv2.weight"), *downsamples]
    widths = tuple(0 if weight is None else weight.shape[0] for weight in convolutions)
    name = next((name for name, config in PRESETS.items() if config.widths == widths), None)
    if name is None:
        known = ", ".join(f"{name} {config.widths}" for name, config in PRESETS.items())
        raise CheckpointError(f"the checkpoint has widths {widths}, allowed are those of {known}")

    heads = [file.state.get(f"{head}.weight") for head in _HEADS]
    settings: dict[str, Any] = {"num_classes": 0 if heads[0] is None or heads[1] is None else heads[0].shape[0]}
    settings |= file.settings()
    if file.dense and "feature_norm" not in settings:
        raise CheckpointError(
            "the checkpoint does not say whether its feature norms are tapped or inline: build the network with "
            "feature_norm and bias_resize, then load_checkpoint"
        )
    tables = [value for key, value in file.state.items() if key.endswith("attention_biases")]
    if tables:
        settings["table_resolution"] = math.isqrt(tables[0].shape[1])
    return name, settings


def _fresh_modules(network: EfficientFormer, file: Normalised, reset_head: bool) -> dict[str, nn.Module]:
    """Modules of `network` that take nothing from the file and are initialised anew."""
    fresh: dict[str, nn.Module] = {}
    has_norm = any(key.startswith("norm.") for key in file.state)
    if file.format == "original-dense" and not has_norm and isinstance(network.norm, nn.LayerNorm):
        fresh["norm"] = network.norm
    heads = {name: head for name in _HEADS if isinstance(head := getattr(network, name), nn.Linear)}
    shapes = [(name, file.state.get(f"{name}.weight")) for name in heads]
    fits = all(weight is not None and weight.shape == heads[name].weight.shape for name, weight in shapes)
    if reset_head and not fits:
        fresh |= heads
    return fresh


def _share_one_head(network: EfficientFormer, state: dict[str, Tensor]) -> None:
    """Give both names of a network's only head (`head_dist` is `head`) the tensors of a file's only head.

    Raises:
        CheckpointError: for a file with two heads that differ.
    """
    if network.head is not network.head_dist:
        return
    for name in ("weight", "bias"):
        found = [state[key] for key in (f"{head}.{name}" for head in _HEADS) if key in state]
        if len(found) == 2 and not (found[0].shape == found[1].shape and torch.equal(*found)):
            raise CheckpointError("the network has one head, and the checkpoint two that differ: give it two heads")
        state |= {f"{head}.{name}": found[0] for head in _HEADS if found}


def _compare(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], fresh: list[str]) -> _Comparison:
    settled = {*state, *fresh}
    missing = [key for key in expected if key not in settled and key.rpartition(".")[2] not in _OPTIONAL]
    result = _Comparison(missing, [], [], set())
    for key, value in state.items():
        if key not in expected:
            result.unexpected.extend([] if key.endswith(_OPTIONAL) else [key])
            continue
        target = expected[key]
        if value.shape != target.shape:
            result.mismatched.append(f"{key}: got {list(value.shape)}, allowed is {list(target.shape)}")
        elif value.is_floating_point() != target.is_floating_point():
            result.mismatched.append(f"{key}: got {value.dtype}, allowed is {target.dtype}")
        elif value.is_floating_point() and value.dtype != target.dtype:
            result.cast.add(f"{value.dtype} -> {target.dtype}".replace("torch.", ""))
    return result


def _complaint(format: str, comparison: _Comparison, strict: bool, network: nn.Module) -> str:
    lines = [f"the {format} checkpoint does not fit the network"]
    parts = {"mis-shaped": comparison.mismatched}
    if strict:
        parts |= {"missing": comparison.missing, "unexpected": comparison.unexpected}
    for title, keys in parts.items():
        if keys:
            lines.append(f"{title} ({len(keys)}):")
            lines += [f"  {key}" for key in keys]
    for path, module in network.named_modules():
        if comparison.missing and (how := remedy(module)):
            lines.append(f"the network's {path or 'own class'} is a {class_of(module)}{how}")
    everything = " ".join(comparison.mismatched + comparison.missing)
    if "head." in everything or "head_dist." in everything:
        lines.append("reset_head=True initialises both heads anew; num_classes=0 builds a network without heads")
    if {"head_dist.weight", "head_dist.bias"} == set(comparison.missing):
        lines.append("the checkpoint has one head: model.head_dist = model.head makes a network with one")
    if any("attention_biases" in line for line in comparison.mismatched):
        lines.append("the bias table of the file has another table_resolution than the network")
    return "\n".join(lines)
