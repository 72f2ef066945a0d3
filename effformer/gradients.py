"""Fused operations whose gradients come from kernels: an autograd function around operators that know no gradient.

Saved for the backward are the input and the parameters as they were given: no other map, no copy in autocast's dtype.
The backward computes everything else anew. `effformer.ops` checks the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .backend import UnsupportedError, products_dtype


def by_kernels(
    operation: str, tensors: Sequence[Tensor | None], options: Sequence[Any], deterministic: bool | None = None
) -> Tensor:
    """`ops.<operation>` by kernels, in both directions.

    Args:
        operation: "meta4d" without a layer scale is "conv_mlp".
        tensors: in the operator's order, the input first.
        options: in the operator's order, up to `deterministic`.
        deterministic: of the forward, where the operation has a choice.
    """
    x, others = tensors[0], () if deterministic is None else (deterministic,)
    assert x is not None
    result: Tensor = _ByKernels.apply(operation, tuple(options), others, products_dtype(x), *tensors)  # type: ignore[no-untyped-call]
    return result


_SETTINGS = 4  # arguments of the function before its tensors


class _ByKernels(Function):
    @staticmethod
    def forward(
        operation: str, options: tuple[Any, ...], others: tuple[Any, ...], dtype: torch.dtype, *tensors: Tensor | None
    ) -> Tensor:
        from .kernels import operators

        cast = with_products(tensors, dtype)
        if operation == "meta4d" and cast[1] is None:
            return operators.conv_mlp(cast[0], *cast[2:], *options, *others)
        result: Tensor = getattr(operators, operation)(*cast, *options, *others)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.operation, ctx.options, _, ctx.dtype = inputs[:_SETTINGS]
        ctx.save_for_backward(*inputs[_SETTINGS:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        from .kernels import operators

        needed = list(ctx.needs_input_grad[_SETTINGS:])
        if grad is None:
            return (None,) * (_SETTINGS + len(needed))
        saved = ctx.saved_tensors  # once: checkpointing unpacks them anew each time
        with torch.no_grad():
            cast = with_products(saved, ctx.dtype)
            found = getattr(operators, f"{ctx.operation}_backward")(grad, *cast, *ctx.options, needed)
        return *((None,) * _SETTINGS), *given(found, saved, needed, grad)


def with_products(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """The tensors, matrices in the dtype of products."""
    return [one.to(dtype) if one is not None and one.ndim == 2 else one for one in tensors]


def given(
    found: list[Tensor], of: tuple[Tensor | None, ...], needed: list[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients in the dtypes of what they are of; None where they are not needed."""
    gradients: list[Tensor | None] = []
    for one, other, wanted in zip(found, of, needed, strict=True):
        if not wanted or other is None:
            gradients.append(None)
            continue
        one = one.to(other.dtype)
        if torch.is_grad_enabled():  # create_graph=True
            one = _Once.apply(one, grad, *of)  # type: ignore[no-untyped-call]
        gradients.append(one)
    return tuple(gradients)


class _Once(Function):
    """A gradient that depends on `sources`, and cannot be differentiated: without it, a part would silently be lost."""

    @staticmethod
    def forward(gradient: Tensor, *sources: Tensor | None) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise UnsupportedError("backend='triton': its kernels have no second derivative, use backend='eager'")
