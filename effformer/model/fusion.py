"""The choice, at each forward of a block, between its fused operation and its modules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import ops
from .wrappers import class_of, remedy

ACTIVATION_MODULES: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "hard_swish": nn.Hardswish,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
}

# Settings that the fused operations assume of a module, beside its class.
_EXPECTED: dict[type[nn.Module], Callable[[Any], bool]] = {
    nn.AvgPool2d: lambda m: (
        (m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override)
        == (3, 1, 1, False, False, None)
    ),
    nn.Conv2d: lambda m: (m.kernel_size, m.stride, m.padding, m.groups) == ((1, 1), (1, 1), (0, 0), 1),
    nn.BatchNorm2d: lambda m: m.affine,
    nn.SyncBatchNorm: lambda m: m.affine,
    nn.LayerNorm: lambda m: len(m.normalized_shape) == 1 and m.weight is not None and m.bias is not None,
    nn.GroupNorm: lambda m: m.num_groups == 1 and m.affine,
    nn.Linear: lambda m: m.bias is not None,
    nn.GELU: lambda m: m.approximate == "none",
    nn.LeakyReLU: lambda m: m.negative_slope == 0.01,
}

# In eval mode a SyncBatchNorm computes what a BatchNorm2d does.
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)

_Kinds = tuple[type[nn.Module], ...]
_P = ParamSpec("_P")


class Fusable(nn.Module):
    """A module for which one or two fused operations compute the same as its own modules in eval mode.

    Attributes:
        parts: the classes that its submodules were built as, as (owner, "" for itself; name; classes). Without classes,
            it is the class of `activation`.
        activation: of the MLP, where there is one.
        backend: "auto", "eager" or "triton", see `effformer.ops`.
    """

    parts: tuple[tuple[str, str, _Kinds], ...]
    activation: str = "gelu"
    backend: str

    def note_parts(self, **others: _Kinds) -> None:
        """Note the classes of all submodules at the end of `__init__`, by name also `others`, to find replaced ones."""
        found = []
        for path, module in self.named_modules():
            owner, _, name = path.rpartition(".")
            found.append((owner, name, () if name == "act" else others.get(name, (type(module),))))
        self.parts = tuple(found[1:])

    def fused(self, *args: Any, **kwargs: Any) -> Tensor:
        """The result by fused operations, for the arguments of the decorated method."""
        raise NotImplementedError

    def fused_training(self, *args: Any, **kwargs: Any) -> Tensor:
        """The result in training by a fused operation, for the arguments of the decorated method."""
        raise NotImplementedError

    def describe_training(self, *args: Any, **kwargs: Any) -> object:
        """Launch what `fused_training` would; nothing is drawn, and running statistics stay."""
        return self.fused(*args, **kwargs)

    def why_no_fused_training(self) -> str | None:
        """The reason why `fused_training` does not compute the same as the modules now; None where it does."""
        return self.why_composed()

    def why_composed(self) -> str | None:
        """The reason why the fused operation does not compute the same as the modules now; None where it does."""
        parts = self.plain_parts()
        if isinstance(parts, str):
            return parts
        if any(type(part) in BATCH_NORMS and uses_batch(part) for part in parts):
            return "BatchNorm uses batch statistics here (training mode)"
        if is_active(*parts):
            return "dropout or stochastic depth is active here (training mode)"
        return None

    def plain_parts(self) -> list[nn.Module] | str:
        """Its submodules, if they are as they were built; else the way in which one is not."""
        if _has_any_global_hook():
            return "hooks for all modules are registered"
        parts: list[Any] = []
        for owner, name, kinds in self.parts:
            # Not by attribute: this runs at each forward, and nn.Module.__getattr__ is slow.
            modules = self._modules[owner]._modules if owner else self._modules  # type: ignore[union-attr]
            module = modules.get(name)
            if not is_plain(module, kinds := kinds or (ACTIVATION_MODULES[self.activation],)):
                path = f"{owner}.{name}" if owner else name
                return f"submodule {path!r} {change_of(module, kinds)}"
            parts.append(module)
        if self.activation not in ops.ACTIVATIONS:
            return f"activation {self.activation!r} has parameters"
        return parts


_Block = TypeVar("_Block", bound=Fusable)


def fusable(composed: Callable[Concatenate[_Block, _P], Tensor]) -> Callable[Concatenate[_Block, _P], Tensor]:
    """Decorate a method that calls modules: where the fused operation computes the same, `fused` runs in its place.

    Batch statistics and active stochastic depth take `fused_training` under "triton", where a block has it. Hooks on
    submodules, replaced submodules, active dropout and activations with parameters need the modules. So does FX under
    the eager backend, since TorchScript compiles modules alone.

    Raises:
        UnsupportedError: by the decorated method, for backend="triton" where the modules are needed.
    """

    @functools.wraps(composed)
    def chosen(self: _Block, /, *args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        reason = self.why_composed()
        if reason is None:
            if self.backend != "eager" or not _is_traced(*args, *kwargs.values()):
                return self.fused(*args, **kwargs)
            reason = "FX traces the eager backend"
        elif self.backend == "triton":
            reason = self.why_no_fused_training()
            if reason is None:
                return self.fused_training(*args, **kwargs)
        ops.refuse_triton(self.backend, reason)
        return composed(self, *args, **kwargs)

    return chosen


def _is_traced(*values: object) -> bool:
    return any(isinstance(value, torch.fx.Proxy) for value in values)


def is_plain(module: nn.Module | None, kinds: _Kinds, expected: Callable[[Any], bool] | None = None) -> bool:
    """Whether `module` still is one of `kinds` as it was built here, without hooks or another forward.

    `expected` replaces the settings that the fused operations assume of the module.
    """
    kind = type(module)
    if module is None or "forward" in module.__dict__:
        return False
    if kind not in kinds and not (kind is nn.SyncBatchNorm and nn.BatchNorm2d in kinds):
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    expected = expected or _EXPECTED.get(kind)
    return expected is None or expected(module)


def change_of(module: nn.Module | None, kinds: _Kinds) -> str:
    """The way in which `module` differs from one of `kinds` as it was built, where `is_plain` finds that it does."""
    if torch.compiler.is_compiling():  # which has no use for the words
        return "was replaced, changed or has hooks"
    if module is None:
        return "was removed"
    if type(module) not in (*kinds, nn.SyncBatchNorm):
        return f"is a {class_of(module)}, not a {' or '.join(kind.__name__ for kind in kinds)}{remedy(module)}"
    if "forward" in module.__dict__:
        return "has another forward"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"has hooks{remedy(module)}"
    return f"has other settings than the fused operations take: {module}"


def why_other(module: nn.Module, kinds: _Kinds) -> str | None:
    """The reason why fused operations would not compute the same as `module`; None where they would."""
    if not is_plain(module, kinds):
        return f"it {change_of(module, kinds)}"
    why_composed: Callable[[], str | None] | None = getattr(module, "why_composed", None)
    return why_composed() if why_composed else None


def refuse_hooks(*modules: nn.Module) -> None:
    """Raise a ValueError if one of these has hooks or another forward, which a snapshot would leave out."""
    for module in modules:
        if not is_plain(module, (type(module),)):
            raise ValueError(f"model: its {type(module).__name__} has hooks or another forward, allowed are none")


def replaces(module: nn.Module, kind: type[nn.Module], *methods: str) -> bool:
    """Whether `module`, or its class, has other methods of these names than `kind`."""
    return any(name in vars(module) or getattr(type(module), name) is not getattr(kind, name) for name in methods)


def uses_batch(norm: Any) -> bool:
    """Whether a BatchNorm uses the batch's statistics now."""
    return bool(norm.training or norm.running_mean is None)


def is_active(*modules: nn.Module) -> bool:
    """Whether one of these, `nn.Dropout` or `DropPath`, drops anything now; other modules never do."""
    return any(module.training and (vars(module).get("p") or vars(module).get("rate")) for module in modules)


def why_other_halving(conv: nn.Module, norm: nn.Module, names: tuple[str, str] = ("conv", "norm")) -> str | None:
    """The reason why these are not a plain 3x3 convolution of stride 2 and its BatchNorm in eval mode."""
    if not is_plain(conv, (nn.Conv2d,), expected=_is_halving):
        return f"submodule {names[0]!r} {change_of(conv, (nn.Conv2d,))}"
    if not is_plain(norm, (nn.BatchNorm2d,)):
        return f"submodule {names[1]!r} {change_of(norm, (nn.BatchNorm2d,))}"
    return "BatchNorm uses batch statistics" if norm.training or norm.running_mean is None else None


def _is_halving(conv: Any) -> bool:
    geometry = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
    return geometry == ((3, 3), (2, 2), (1, 1), (1, 1), 1, "zeros")
