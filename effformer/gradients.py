"""Fused operations whose gradients come from kernels: autograd functions around operators that know no gradient.

Saved for the backward are the input and the parameters as they were given: no other map, no copy in autocast's dtype.
The backward computes everything else anew. `effformer.ops` checks the arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .backend import UnsupportedError, products_dtype

_TENSORS = 8  # x, layer_scale1, weight1, scale1, shift1, weight2, scale2, shift2


def pool_mixer(x: Tensor, layer_scale: Tensor) -> Tensor:
    """`ops.pool_mixer` by kernels, in both directions."""
    result: Tensor = _PoolMixer.apply(x, layer_scale)  # type: ignore[no-untyped-call]
    return result


def mlp(x: Tensor, layer_scale1: Tensor | None, *rest: Any) -> Tensor:
    """`ops.meta4d` or, without a layer scale, `ops.conv_mlp` by kernels, in both directions.

    `rest` are the other arguments in their order, up to `activation` and `deterministic`.
    """
    result: Tensor = _Mlp.apply(x, layer_scale1, *rest, products_dtype(x))  # type: ignore[no-untyped-call]
    return result


class _PoolMixer(Function):
    @staticmethod
    def forward(x: Tensor, layer_scale: Tensor) -> Tensor:
        from .kernels.pool_mixer import pool_mixer as kernel

        return kernel(x, layer_scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        from .kernels.pool_mixer_backward import pool_mixer_backward

        if grad is None:
            return None, None
        x, layer_scale = ctx.saved_tensors
        needed = list(ctx.needs_input_grad)
        with torch.no_grad():
            found = pool_mixer_backward(grad, x, layer_scale, needed)
        return _given(found, (x, layer_scale), needed, grad)


class _Mlp(Function):
    @staticmethod
    def forward(x: Tensor, layer_scale1: Tensor | None, *rest: Any) -> Tensor:
        weight1, scale1, shift1, weight2, scale2, shift2, activation, deterministic, dtype = rest
        arguments = weight1.to(dtype), scale1, shift1, weight2.to(dtype), scale2, shift2, activation, deterministic
        if layer_scale1 is None:
            from .kernels.conv_mlp import conv_mlp

            return conv_mlp(x, *arguments)
        from .kernels.meta4d import meta4d

        return meta4d(x, layer_scale1, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:_TENSORS])
        ctx.activation, _, ctx.dtype = inputs[_TENSORS:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        from .kernels.meta4d_backward import meta4d_backward

        nothing = (None,) * (len(ctx.needs_input_grad) - _TENSORS)
        if grad is None:
            return *((None,) * _TENSORS), *nothing
        saved = ctx.saved_tensors  # once: checkpointing unpacks them anew each time
        x, layer_scale1, weight1, scale1, shift1, weight2, scale2, _ = saved
        needed = list(ctx.needs_input_grad[:_TENSORS])
        with torch.no_grad():
            weights = weight1.to(ctx.dtype), scale1, shift1, weight2.to(ctx.dtype), scale2
            found = meta4d_backward(grad, x, layer_scale1, *weights, ctx.activation, needed)
        return *_given(found, saved, needed, grad), *nothing


def _given(
    found: list[Tensor], of: tuple[Tensor | None, ...], needed: list[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients in the dtypes of what they are of; None where they are not needed."""
    given: list[Tensor | None] = []
    for one, other, wanted in zip(found, of, needed, strict=True):
        if not wanted or other is None:
            given.append(None)
            continue
        one = one.to(other.dtype)
        if torch.is_grad_enabled():  # create_graph=True
            one = _Once.apply(one, grad, *of)  # type: ignore[no-untyped-call]
        given.append(one)
    return tuple(given)


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
