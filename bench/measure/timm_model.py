"""timm's network, prepared to be fast."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def import_timm() -> Any:
    """timm, on a CPU build of torch too.

    Raises:
        ImportError: where timm or torchvision is not installed.
    """
    import_torchvision()
    import timm

    return timm


def import_torchvision() -> None:
    """On a CPU build of torch torchvision's operators do not load, and it asks for two of them: make it importable.

    Raises:
        ImportError: where torchvision is not installed.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error) or torch.version.cuda is not None:
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)


_KEPT: list[torch.library.Library] = []  # garbage collection of a library would remove its operators


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Fold every BatchNorm of an evaluating network into the convolution before it, in place; returns `model`.

    A module's children are taken to be applied in the order in which they stand, as those of timm's EfficientFormer
    are.

    Raises:
        ValueError: for a BatchNorm without a convolution right before it.
    """
    for path, module in list(model.named_modules()):
        before: tuple[str, nn.Module] | None = None
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                if before is None or not isinstance(before[1], nn.Conv2d):
                    raise ValueError(f"model: got a BatchNorm without a convolution right before it, {path}.{name}")
                setattr(module, before[0], fuse_conv_bn_eval(before[1], child))
                setattr(module, name, nn.Identity())
            before = name, child
    return model
