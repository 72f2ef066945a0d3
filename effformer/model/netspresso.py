"""NetsPresso Trainer's backbone interface over the network."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from ..checks import check_choice
from ..config import DENSE_TASKS, TASKS, BiasResize, FeatureNorm
from .adapter import AdapterSpec
from .fusion import refuse_hooks
from .meta4d import ConvMlp
from .netspresso_file import read_netspresso
from .network import EfficientFormer
from .wrappers import refusal


class BackboneOutput(TypedDict, total=False):
    """The input of a trainer's head or neck; the task decides which key is there."""

    last_feature: Tensor
    intermediate_features: tuple[Tensor, ...]


class Backbone(nn.Module):
    """An EfficientFormer behind NetsPresso Trainer's interface: images [B, 3, H, W] -> a dict.

    For classification, `last_feature` [B, C]: the mean of the tokens after the final LayerNorm. For segmentation,
    detection and pose_estimation, `intermediate_features`: four maps [B, C_i, H / r, W / r], r = 4, 8, 16, 32.

    Attributes:
        network: the `EfficientFormer`, without heads.
        task: one of `config.TASKS`.
    """

    def __init__(self, network: EfficientFormer, task: str) -> None:
        super().__init__()
        check_choice("task", task, TASKS)
        self.network = network
        self.task = task

    @property
    def feature_dim(self) -> int:
        """Channels of `last_feature`."""
        return self.network.config.widths[-1]

    @property
    def intermediate_features_dim(self) -> list[int]:
        """Channels of each of the `intermediate_features`."""
        return list(self.network.config.widths)

    def task_support(self, task: str) -> bool:
        """Whether a backbone for `task` can be built."""
        return task.lower() in TASKS

    def forward(self, x: Tensor) -> BackboneOutput:
        if self.task in DENSE_TASKS:
            maps = self.network.forward_intermediates(x, intermediates_only=True)
            return _output_of_maps(maps)
        features = self.network.forward_features(x)
        return _output_of_pooled(self.network.forward_head(features, pre_logits=True))

    def describe_for_freeze(self, dtype: torch.dtype) -> AdapterSpec:
        """For `effformer.freeze`, see `Adapter`."""
        refuse_hooks(self)
        if self.task in DENSE_TASKS:
            return AdapterSpec(self.network, "features", _output_of_maps)
        return AdapterSpec(self.network, "pooled", _output_of_pooled)


def _output_of_maps(maps: list[Tensor]) -> BackboneOutput:
    return {"intermediate_features": tuple(maps)}


def _output_of_pooled(pooled: Tensor) -> BackboneOutput:
    return {"last_feature": pooled}


def build_backbone(
    source: str | Path | Mapping[str, Any],
    task: str | None = None,
    backend: str = "auto",
    *,
    bias_resize: BiasResize = "matrix-bilinear",
    feature_norm: FeatureNorm | Literal["auto"] | None = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Backbone:
    """Build the backbone that a NetsPresso Trainer configuration describes.

    Args:
        source: a trainer's YAML file or its content, whole or the backbone's part: see `read_netspresso`.
        task: "classification", "segmentation", "detection" or "pose_estimation". It replaces the file's `model.task`;
            where neither names one, the task is classification.
        backend: "auto", "eager" or "triton", see `effformer.ops`.
        bias_resize: how the attention bias meets other image sizes. The default is the trainer's way; "table" keeps
            the meaning of the learned offsets.
        feature_norm: None, "tap" or "inline", see `EfficientFormerConfig`; "auto" is the trainer's choice: "inline"
            for the dense tasks, None for classification.
        device, dtype: of parameters and buffers.

    Returns:
        a `Backbone` in training mode, its weights initialised as by the trainer.

    Raises:
        ConfigError: (a ValueError) naming every field of `source` that is missing, unknown or wrong.
        ValueError: for another argument that is wrong.
    """
    config, chosen = read_netspresso(source, task)
    task = chosen or "classification"
    if feature_norm == "auto":
        feature_norm = "inline" if task in DENSE_TASKS else None
    config = replace(config, bias_resize=bias_resize, feature_norm=feature_norm)
    network = EfficientFormer(config, num_classes=0, backend=backend, device=device, dtype=dtype)
    _initialise_as_trainer(network)
    return Backbone(network, task)


def network_within(model: nn.Module) -> EfficientFormer:
    """`model` itself, or the network of a `Backbone`.

    Raises:
        TypeError: for anything else; for a module around one it names the part to pass.
    """
    network = model.network if isinstance(model, Backbone) else model
    if not isinstance(network, EfficientFormer):
        raise refusal(model, (EfficientFormer, Backbone), "an EfficientFormer or a Backbone of effformer")
    return network


def _initialise_as_trainer(network: EfficientFormer) -> None:
    """As NetsPresso Trainer 1.4.1: convolutions of the conv MLP from a normal distribution, the rest by default."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
        elif isinstance(module, ConvMlp):
            for conv in (module.fc1, module.fc2):
                nn.init.trunc_normal_(conv.weight, std=0.02)
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)
