"""When a fused operation describes what a block of modules computes, and when the modules have to be called."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.fx
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from .. import ops

# What the fused operations take for granted of a module beyond its class.
_EXPECTED: dict[type[nn.Module], Callable[[Any], bool]] = {
    nn.AvgPool2d: lambda m: (
        (m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override)
        == (3, 1, 1, False, False, None)
    ),
    nn.Conv2d: lambda m: (m.kernel_size, m.stride, m.padding, m.groups) == ((1, 1), (1, 1), (0, 0), 1),
    nn.BatchNorm2d: lambda m: m.affine,
    nn.LayerNorm: lambda m: len(m.normalized_shape) == 1 and m.weight is not None and m.bias is not None,
    nn.GroupNorm: lambda m: m.num_groups == 1 and m.affine,
    nn.Linear: lambda m: m.bias is not None,
    nn.GELU: lambda m: m.approximate == "none",
    nn.LeakyReLU: lambda m: m.negative_slope == 0.01,
}


def is_plain(
    module: nn.Module | None,
    kinds: tuple[type[nn.Module], ...],
    expected: Callable[[Any], bool] | None = None,
) -> bool:
    """Whether calling `module` does what one of `kinds`, as it was built here, does, and nothing more.

    `expected` replaces what the fused operations take for granted of the module.
    """
    kind = type(module)
    if module is None or kind not in kinds or "forward" in module.__dict__:
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    expected = expected or _EXPECTED.get(kind)
    return expected is None or expected(module)


def why_changed(
    parts: Iterable[tuple[str, nn.Module | None, tuple[type[nn.Module], ...]]], activation: str
) -> str | None:
    """Why parts (name, module, classes it was built as) with this activation are no fused operation; None if they are.

    Modes (training or not) are for the caller to look at.
    """
    if _has_any_global_hook():
        return "hooks for all modules are registered"
    for name, module, kinds in parts:
        if not is_plain(module, kinds):
            return f"submodule {name!r} was replaced, changed or has hooks"
    if activation not in ops.ACTIVATIONS:
        return f"activation {activation!r} has parameters"
    return None


def why_unrolled(x: object, backend: str) -> str | None:
    """Why FX is to record modules, which TorchScript compiles, and no fused operation; None without FX or eager."""
    return "FX traces the eager backend" if backend == "eager" and isinstance(x, torch.fx.Proxy) else None


def is_active(*dropouts: nn.Module) -> bool:
    """Whether one of these, `nn.Dropout` or `DropPath`, drops anything now."""
    return any(module.training and getattr(module, "p", getattr(module, "rate", 0)) > 0 for module in dropouts)
