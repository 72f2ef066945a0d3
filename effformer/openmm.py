"""A backbone for MMDetection and MMSegmentation: built from a dict, `out_indices`, a tuple of maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .checkpoints import hub
from .checkpoints.formats import CheckpointError
from .checkpoints.load import load_checkpoint
from .checks import check_choice
from .factory import create_model
from .features import Features
from .model.adapter import AdapterSpec
from .model.fusion import refuse_hooks


class EffFormer(nn.Module):
    """Images [B, 3, H, W] -> maps [B, C, ceil(H / stride), ceil(W / stride)], a tuple.

    Register it with `MODELS.register_module(module=EffFormer)`. In the original repository's configurations, replace
    `type="efficientformer_l1_feat"` by `_delete_=True, type="EffFormer", name="efficientformer_l1"`. Without `_delete_`
    they inherit a ResNet's keywords (depth, frozen_stages, ...), which the original ignores and this class refuses.

    Args:
        name: one of `effformer.list_models()`.
        out_indices: stages, rising.
        norm_eval: keep BatchNorm's statistics as they are in training, too.
        init_cfg: None, or dict(type="Pretrained", checkpoint=...) with a file, a folder or a hub id of any format. The
            framework calls `init_weights` to load it. Heads are ignored; norms of the maps may be absent.
        style: "pytorch", the only place of the stride here.
        feature_norm: of the maps, the original dense variant's by default; see `effformer.EfficientFormerConfig`.
        **kwargs: keywords of `effformer.create_model`.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """

    def __init__(
        self,
        name: str = "efficientformer_l1",
        out_indices: Sequence[int] = (0, 1, 2, 3),
        norm_eval: bool = False,
        init_cfg: Mapping[str, Any] | None = None,
        style: str = "pytorch",
        feature_norm: str | None = "tap",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        check_choice("style", style, ("pytorch",))
        if init_cfg is not None and (set(init_cfg) != {"type", "checkpoint"} or init_cfg["type"] != "Pretrained"):
            raise ValueError(f"init_cfg: got {init_cfg!r}, allowed are None and type='Pretrained' with a checkpoint")
        self.norm_eval, self.init_cfg = norm_eval, init_cfg
        network = create_model(name, num_classes=0, feature_norm=feature_norm, **kwargs)
        self.features = Features(network, out_indices)

    def init_weights(self) -> None:
        """Load the checkpoint of `init_cfg`.

        Raises:
            CheckpointError: (a RuntimeError) where the file does not fit.
        """
        if self.init_cfg is None:
            return
        network, source = self.features.network, self.init_cfg["checkpoint"]
        report = load_checkpoint(network, hub.locate(source), strict=False)
        pruned = tuple(f"stages.{index}." for index in range(len(network.stages), network.num_stages))
        wrong = [key for key in report.missing if not key.startswith("feature_norms.")]
        wrong += [key for key in report.unexpected if not key.startswith(("norm.", "feature_norms.", *pruned))]
        if wrong:
            raise CheckpointError(f"init_cfg: {source} does not fit the network: {', '.join(wrong)}")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.features(x))

    def describe_for_freeze(self, dtype: torch.dtype) -> AdapterSpec:
        """For `effformer.freeze`, see `effformer.model.adapter.Adapter`."""
        refuse_hooks(self)
        return replace(self.features.describe_for_freeze(dtype), convert=tuple)

    def train(self, mode: bool = True) -> EffFormer:
        super().train(mode)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self
