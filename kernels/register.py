"""Registration of the operators with torch.library.

`Library.define` and `impl` cost half of what `custom_op` does at each call, and pass `opcheck` under the interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .launch import INTERPRETED

NAMESPACE = "effformer"  # of the operators in torch.ops
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {}  # by operator; they also take tensors on the meta device


def register(schema: str, implementation: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Define `schema` in `NAMESPACE` for CUDA, for the CPU under Triton's interpreter, and for tracing (`fake`).

    The operators have no gradient. `effformer.ops` never asks for one, and PyTorch warns other callers. (An autograd
    kernel that raises would cost 5 µs at each call.)
    A fake is the function that the implementation allocates with, so that strides agree. It takes the first arguments,
    as many as it needs.
    """
    name = schema.partition("(")[0]
    IMPLEMENTATIONS[name] = implementation
    # Compilers must pass inputs in the layout that they had while tracing: outputs follow it.
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _LIBRARY.impl(name, implementation, "CUDA")
    _LIBRARY.impl(name, implementation if INTERPRETED else functools.partial(_on_cpu, implementation), "CPU")
    needed = sum(one.default is one.empty for one in inspect.signature(fake).parameters.values())
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *arguments: fake(*arguments[:needed]), lib=_LIBRARY)
    return _operator(name)


_Fake = TypeVar("_Fake", bound=Callable[..., Any])


def register_gradients(
    schema: str, implementation: Callable[..., Sequence[Tensor | None]], like: Callable[[Tensor], Tensor]
) -> Callable[..., list[Tensor]]:
    """`register` for an operator (grad, x, *tensors, *options, needed) that returns the gradients of x and the tensors.

    Those that are not needed, and those of tensors that are None, are empty. That of x is `like` x, those of all others
    are float32. `implementation` returns None for what is not needed. It runs without autocast, in whose dtype the
    vendor's products would be where a backward runs within it.
    """

    def run(grad: Tensor, x: Tensor, *others: Any) -> list[Tensor]:
        with _no_autocast(x.device):
            found = implementation(grad, x, *others)
        return [x.new_empty(0) if one is None else one for one in found]

    def fake(grad: Tensor, x: Tensor, *others: Any) -> list[Tensor]:
        *rest, needed = others
        found = []
        for place, (one, wanted) in enumerate(zip((x, *rest), needed, strict=False)):
            if not wanted or one is None:
                found.append(x.new_empty(0))
            else:
                found.append(like(x) if place == 0 else x.new_empty(one.shape, dtype=torch.float32))
        return found

    return register(schema, run, takes_arguments_of(implementation)(fake))  # type: ignore[arg-type,return-value]


def takes_arguments_of(implementation: Callable[..., Any]) -> Callable[[_Fake], _Fake]:
    """Decorate a fake that takes all arguments of an implementation: `register` passes as many as its signature has."""

    def decorate(fake: _Fake) -> _Fake:
        fake.__signature__ = inspect.signature(implementation)  # type: ignore[attr-defined]
        return fake

    return decorate


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """As `effformer.backend.no_autocast`, which kernels do not import: they are also shipped without the package."""
    if device.type not in ("cuda", "cpu") or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def arguments_of(operator: str, tensors: Sequence[Tensor], options: Mapping[str, Any]) -> list[Any]:
    """The arguments of an operator in its order: `tensors` in turn, for the others `options` or the defaults.

    Options that it does not have are left out.
    """
    remaining = iter(tensors)
    found: list[Any] = []
    for argument in _operator(operator)._schema.arguments:  # type: ignore[attr-defined]
        if str(argument.type) in ("Tensor", "Optional[Tensor]"):
            found.append(next(remaining, None))
        else:
            found.append(options.get(argument.name, argument.default_value))
    return found


def _operator(name: str) -> Callable[..., Tensor]:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


_cpu_accepted = False


@contextlib.contextmanager
def accepting_cpu() -> Iterator[None]:
    """Within it the operators take CPU tensors to Triton's driver, which must know what to do with them."""
    global _cpu_accepted
    before, _cpu_accepted = _cpu_accepted, True
    try:
        yield
    finally:
        _cpu_accepted = before


def _on_cpu(implementation: Callable[..., Tensor], *arguments: Any) -> Tensor:
    if not _cpu_accepted:
        raise RuntimeError("the kernels run on a CPU only in a process started with TRITON_INTERPRET=1")
    return implementation(*arguments)
