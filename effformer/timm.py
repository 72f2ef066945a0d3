"""effformer's networks by timm's names: after `import effformer.timm`, `timm.create_model("effformer_l1", ...)`.

They are built by `effformer.create_model`, whose keywords they take (an unknown one is an error), and their trained
weights are timm's own: `pretrained=True` means what it means for timm's `efficientformer_l1`. Needs the extra `timm`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from .checkpoints import hub
from .checkpoints.formats import normalise
from .factory import create_model
from .model.network import EfficientFormer

try:  # absolute: timm itself
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.layers.config import is_scriptable
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
except ImportError as error:
    raise ImportError("effformer.timm: no timm, or too old a one: install effformer[timm]") from error


def _cfg(hub_id: str) -> dict[str, Any]:
    return {
        "url": "",
        "hf_hub_id": hub_id,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "min_input_size": (3, 32, 32),
        "pool_size": None,
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": ("head", "head_dist"),
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {f"effformer_{name.rpartition('_')[2]}.snap_dist_in1k": _cfg(hub_id) for name, hub_id in hub.PRETRAINED.items()}
)


def _timm_keys(state: dict[str, Tensor], model: EfficientFormer) -> dict[str, Tensor]:
    return normalise(state).state


def _create(size: str, pretrained: bool, **kwargs: Any) -> EfficientFormer:
    feature_cls = kwargs.get("feature_cls", "getter")
    if kwargs.get("feature_norm") and feature_cls != "getter":
        raise ValueError(f"feature_cls: got {feature_cls!r}, allowed is 'getter' with a feature_norm")
    if is_scriptable():  # TorchScript compiles what FX makes of the eager backend
        kwargs.setdefault("backend", "eager")
    # The getter is `forward_intermediates`. What else timm has reads the stages: tokens from the last one.
    feature_cfg = {"out_indices": 4, "feature_cls": "getter", "flatten_sequential": True}
    model: EfficientFormer = build_model_with_cfg(
        partial(create_model, f"efficientformer_{size}"),
        f"effformer_{size}",
        pretrained,
        pretrained_filter_fn=_timm_keys,
        feature_cfg=feature_cfg,
        **kwargs,
    )
    if pretrained:  # transformers' TimmBackbone draws every BatchNorm anew that does not say this (5.23)
        for module in model.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]
    return model


@register_model
def effformer_l1(pretrained: bool = False, **kwargs: Any) -> EfficientFormer:
    """EfficientFormer-L1, 12.29 M parameters."""
    return _create("l1", pretrained, **kwargs)


@register_model
def effformer_l3(pretrained: bool = False, **kwargs: Any) -> EfficientFormer:
    """EfficientFormer-L3, 31.41 M parameters."""
    return _create("l3", pretrained, **kwargs)


@register_model
def effformer_l7(pretrained: bool = False, **kwargs: Any) -> EfficientFormer:
    """EfficientFormer-L7, 82.23 M parameters."""
    return _create("l7", pretrained, **kwargs)
