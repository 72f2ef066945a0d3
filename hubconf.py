"""Entry points of torch.hub: `torch.hub.load(CHECKOUT, "efficientformer_l1", source="local")`."""

from __future__ import annotations

from pathlib import Path as _Path  # torch.hub lists every callable without an underscore as an entry point
from typing import Any as _Any

import effformer

dependencies = ["torch", "safetensors", "yaml"]

# A checkout keeps two packages beside `effformer`, not in it. An installed or editable effformer finds them by itself.
_CHECKOUT = _Path(__file__).resolve().parent
if _Path(effformer.__file__).resolve().parent == _CHECKOUT / "effformer" and str(_CHECKOUT) not in effformer.__path__:
    effformer.__path__.append(str(_CHECKOUT))


def efficientformer_l1(pretrained: bool = False, **keywords: _Any) -> effformer.EfficientFormer:
    """EfficientFormer-L1, 12.29 M parameters.

    Args:
        pretrained: load timm's ImageNet-1k weights; this needs the package huggingface_hub, and downloads.
        **keywords: of `effformer.create_model`, such as num_classes=10 or checkpoint="FILE".

    Returns:
        the network, in training mode.

    Raises:
        TypeError, ValueError, CheckpointError, OSError, ImportError: as `effformer.create_model`.
    """
    return effformer.create_model("efficientformer_l1", pretrained=pretrained, **keywords)


def efficientformer_l3(pretrained: bool = False, **keywords: _Any) -> effformer.EfficientFormer:
    """EfficientFormer-L3, 31.41 M parameters; arguments as for `efficientformer_l1`."""
    return effformer.create_model("efficientformer_l3", pretrained=pretrained, **keywords)


def efficientformer_l7(pretrained: bool = False, **keywords: _Any) -> effformer.EfficientFormer:
    """EfficientFormer-L7, 82.23 M parameters; arguments as for `efficientformer_l1`."""
    return effformer.create_model("efficientformer_l7", pretrained=pretrained, **keywords)
