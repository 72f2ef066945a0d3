"""effformer's networks by timm's names: after `import effformer.timm`, `timm.create_model("effformer_l1", ...)`.

`effformer.create_model` builds them and checks their keywords. Their trained weights are timm's own: `pretrained=True`
loads those of timm's `efficientformer_l1`. Needs the extra `timm`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from .checkpoints import hub
from .checkpoints.formats import normalise
from .extras import install
from .factory import create_model, pretrained_cfg
from .model.network import EfficientFormer

try:  # absolute: timm itself
    from timm.layers.config import is_scriptable
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
except ImportError as error:
    raise ImportError(f"effformer.timm: no timm, or too old a one: {install('timm')}") from error


default_cfgs = generate_default_cfgs(
    {
        f"effformer_{name.rpartition('_')[2]}.snap_dist_in1k": {
            key: value for key, value in pretrained_cfg(name).items() if key not in ("architecture", "fixed_input_size")
        }
        for name in hub.PRETRAINED
    }
)


def _create(size: str, pretrained: bool, **kwargs: Any) -> EfficientFormer:
    feature_cls = kwargs.get("feature_cls", "getter")
    if kwargs.get("feature_norm") and feature_cls != "getter":
        raise ValueError(f"feature_cls: got {feature_cls!r}, allowed is 'getter' with a feature_norm")
    if is_scriptable():  # TorchScript compiles the modules that FX records under the eager backend
        kwargs.setdefault("backend", "eager")
    # The getter calls `forward_intermediates`. Timm's other classes read the stages: tokens from the last one.
    feature_cfg = {"out_indices": 4, "feature_cls": "getter", "flatten_sequential": True}
    model: EfficientFormer = build_model_with_cfg(
        partial(create_model, f"efficientformer_{size}"),
        f"effformer_{size}",
        pretrained,
        pretrained_filter_fn=lambda state, model: normalise(state).state,
        feature_cfg=feature_cfg,
        **kwargs,
    )
    if pretrained:  # without this mark, transformers' TimmBackbone (5.23) initialises every BatchNorm anew
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
