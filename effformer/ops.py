"""The fused operations: their arguments, their checks, and the choice of backend (`effformer.backend`).

Scales, shifts, layer scales and bias are float32, or float64 when x is; the output has x's dtype. Functions of tensors
carry `torch.fx.wrap`, so that FX records them as one node. Call them as `ops.name`: FX does not see a bare imported
name. Under autocast, weights and matrix products are in its dtype; sums, norms and softmax stay float32.
"""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor

from . import attention_bias, gradients, reference
from .backend import BACKENDS as BACKENDS
from .backend import Backend as Backend
from .backend import UnsupportedError as UnsupportedError
from .backend import needs_gradient, products_dtype, select_backend
from .backend import refuse_triton as refuse_triton
from .backend import why_not_triton as why_not_triton
from .checks import (
    check_accumulation_dtype,
    check_attention,
    check_bias,
    check_choice,
    check_conv_norm,
    check_heads,
    check_map,
    check_mlp,
    check_tokens,
    check_vectors,
    check_weight,
)
from .train_ops import TrainingResult as TrainingResult
from .train_ops import meta4d_train as meta4d_train

ACTIVATIONS = tuple(reference.ACTIVATIONS)
PIXEL_OFFSET = reference.PIXEL_OFFSET  # `conv_norm` subtracts it from uint8 pixels

# Functions that turn the parameters of modules into arguments. Wrapped here, so that FX sees buffers as buffers.
expand_bias = torch.fx.wrap(attention_bias.expand_bias)
fold_batch_norm = torch.fx.wrap(reference.fold_batch_norm)
fold_layer_scale = torch.fx.wrap(reference.fold_layer_scale)
prepare_bias = attention_bias.prepare_bias
upcast = torch.fx.wrap(reference.upcast)


def _in_products_dtype(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Matrices in the dtype of products for an input x; vectors and attention biases as they are."""
    dtype = products_dtype(x)
    return tuple(tensor.to(dtype) if tensor.ndim == 2 else tensor for tensor in tensors)


@torch.fx.wrap
def pool_mixer(x: Tensor, layer_scale: Tensor, *, backend: str = "auto") -> Tensor:
    """Pooling token mixer with its residual: x + layer_scale * (avg_pool(x) - x).

    The average is over 3x3 pixels, stride 1, and padding does not count into it (paper section 4, MB4D).

    Args:
        x: [B, C, H, W], floating; batch 0 and any H, W >= 1.
        layer_scale: [C], float32 (float64 if x is).
        backend: "auto", "eager" or "triton".

    Returns:
        [B, C, H, W] in x's dtype.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape or backend, naming the argument.
        UnsupportedError: for backend="triton" where the kernels cannot run.
    """
    check_map(x)
    check_vectors(x, x.shape[1], layer_scale=layer_scale)
    if select_backend(backend, x, layer_scale, products=False, differentiable=True) == "eager":
        return reference.pool_mixer(x, layer_scale)
    if needs_gradient(x, layer_scale):
        return gradients.by_kernels("pool_mixer", (x, layer_scale), ())
    from .kernels.pool_mixer import pool_mixer as kernel

    return kernel(x, layer_scale)


@torch.fx.wrap
def conv_mlp(
    x: Tensor,
    weight1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    *,
    activation: str = "gelu",
    deterministic: bool = True,
    backend: str = "auto",
) -> Tensor:
    """1x1 convolutional MLP with its residual: x + scale2 * (W2 · act(scale1 * (W1 · x) + shift1)) + shift2.

    Scales and shifts hold the convolution's bias, BatchNorm in eval mode and the layer scale: see `fold_batch_norm`.

    Args:
        x: [B, C, H, W], floating.
        weight1, weight2: [hidden, C] and [C, hidden], x's dtype (any floating one under autocast).
        scale1, shift1: [hidden]; scale2, shift2: [C]; float32 (float64 if x is).
        activation: one of `ACTIVATIONS`; "gelu" is the exact form.
        deterministic: whether the same input gives the same bits each time. With False, programs that share the hidden
            channels of a few rows add in any order, which takes less memory. Eager ignores this.
        backend: "auto", "eager" or "triton".

    Returns:
        [B, C, H, W] in x's dtype.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, activation or backend, naming the argument.
        UnsupportedError: for backend="triton" where the kernels cannot run.
        RuntimeError: for deterministic=False on the kernels under `torch.use_deterministic_algorithms(True)`.
    """
    check_map(x)
    check_choice("activation", activation, ACTIVATIONS)
    check_mlp(x, x.shape[1], weight1, weight2, scale1=scale1, shift1=shift1, scale2=scale2, shift2=shift2)
    arguments = (weight1, scale1, shift1, weight2, scale2, shift2)
    if select_backend(backend, x, *arguments, activation=activation, differentiable=True) == "eager":
        return reference.conv_mlp(x, *arguments, activation=activation)
    if needs_gradient(x, *arguments):
        return gradients.by_kernels("meta4d", (x, None, *arguments), (activation,), deterministic)
    from .kernels.conv_mlp import conv_mlp as kernel

    return kernel(x, *_in_products_dtype(x, *arguments), activation, deterministic)


@torch.fx.wrap
def meta4d(
    x: Tensor,
    layer_scale1: Tensor,
    weight1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    *,
    activation: str = "gelu",
    deterministic: bool = True,
    backend: str = "auto",
) -> Tensor:
    """A whole 4D MetaBlock in eval mode: `conv_mlp(pool_mixer(x, layer_scale1), ...)`.

    Arguments, result and errors are those of `pool_mixer` and `conv_mlp`.
    """
    check_map(x)
    check_vectors(x, x.shape[1], layer_scale1=layer_scale1)
    check_choice("activation", activation, ACTIVATIONS)
    check_mlp(x, x.shape[1], weight1, weight2, scale1=scale1, shift1=shift1, scale2=scale2, shift2=shift2)
    arguments = (layer_scale1, weight1, scale1, shift1, weight2, scale2, shift2)
    if select_backend(backend, x, *arguments, activation=activation, differentiable=True) == "eager":
        return reference.meta4d(x, *arguments, activation=activation)
    if needs_gradient(x, *arguments):
        return gradients.by_kernels("meta4d", (x, *arguments), (activation,), deterministic)
    from .kernels.meta4d import meta4d as kernel

    return kernel(x, *_in_products_dtype(x, *arguments), activation, deterministic)


@torch.fx.wrap
def conv_norm(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    activation: str | None = None,
    border: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """3x3 convolution of stride 2 and padding 1, BatchNorm, activation: act(scale * conv(x) + shift).

    The stem's two convolutions and the downsamplings (paper section 4). Scale and shift hold the convolution's bias
    and BatchNorm in eval mode: see `fold_batch_norm`.

    Args:
        x: [B, C, H, W], floating, of any strides; or uint8 with a `border`. uint8 x counts as x - PIXEL_OFFSET.
        weight: [O, C, 3, 3], x's dtype (any floating one under autocast, or with uint8 x); best channels_last.
        scale, shift: [O], float32 (float64 if the weight is).
        activation: one of `ACTIVATIONS`, or None.
        border: [C], float32 (float64 if the weight is): the padding of uint8 x, in units of x - PIXEL_OFFSET. It is
            rounded to the weight's dtype. Padding with 0 after normalisation is padding with 255 * mean - PIXEL_OFFSET
            before it. None with floating x, which is padded with 0.
        backend: "auto", "eager" or "triton".

    Returns:
        [B, O, ceil(H / 2), ceil(W / 2)] in x's dtype, or the weight's for uint8; from the kernels channels_last.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, activation or backend, naming the argument.
        UnsupportedError: for backend="triton" where the kernels cannot run.
    """
    if activation is not None:
        check_choice("activation", activation, ACTIVATIONS)
    like = check_conv_norm(x, weight, scale, shift, border)
    borders = () if border is None else (border,)
    if select_backend(backend, like, x, weight, scale, shift, *borders, activation=activation or "relu") == "eager":
        return reference.conv_norm(x, weight, scale, shift, activation=activation, border=border)
    from .kernels.conv_norm import conv_norm as kernel

    dtype = products_dtype(like)
    x = x if border is not None else x.to(dtype)
    return kernel(x, weight.to(dtype), scale, shift, activation, border).to(like.dtype)


@torch.fx.wrap
def bias_attention(qkv: Tensor, bias: Tensor, *, num_heads: int, key_dim: int, backend: str = "auto") -> Tensor:
    """Multi-head attention with a learned bias: softmax(q·kᵀ * key_dim**-0.5 + bias) · v (paper section 4, MB3D).

    Args:
        qkv: [B, N, num_heads * (2 * key_dim + value_dim)], floating; the channels of each head are q | k | v, as in
            timm and the original code.
        bias: [num_heads, N, N], float32 (float64 if qkv is): see `expand_bias`.
        num_heads, key_dim: integers of 1 or more; value_dim follows from qkv.
        backend: "auto", "eager" or "triton".

    Returns:
        [B, N, num_heads * value_dim] in qkv's dtype.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape or backend, naming the argument.
        UnsupportedError: for backend="triton" where the kernels cannot run.
    """
    check_tokens("qkv", qkv)
    check_heads(qkv.shape[2], num_heads, key_dim)
    check_bias(bias, qkv, num_heads)
    if select_backend(backend, qkv, bias, key_dim=key_dim, differentiable=True) == "eager":
        return reference.bias_attention(qkv, bias, num_heads=num_heads, key_dim=key_dim)
    if needs_gradient(qkv, bias):
        tensors = qkv.to(products_dtype(qkv)), bias
        return gradients.by_kernels("bias_attention", tensors, (num_heads, key_dim)).to(qkv.dtype)
    from .kernels.bias_attention import bias_attention as kernel

    return kernel(qkv.to(products_dtype(qkv)), bias, num_heads, key_dim).to(qkv.dtype)


@torch.fx.wrap
def attention_mixer(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    bias: Tensor,
    proj_weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    num_heads: int,
    key_dim: int,
    eps: float = 1e-5,
    prepared: bool = False,
    backend: str = "auto",
) -> Tensor:
    """First half of a 3D MetaBlock: x + scale * (proj · attention(qkv · LayerNorm(x) + qkv_bias)) + shift.

    The attention is `bias_attention`; scale and shift hold the layer scale and, times it, the projection's bias: see
    `fold_layer_scale` (paper section 4, MB3D).

    Args:
        x: [B, N, C], floating.
        norm_weight, norm_bias: [C], of the LayerNorm.
        qkv_weight, qkv_bias: [num_heads * (2 * key_dim + value_dim), C] and its first dimension.
        bias: [num_heads, N, N]; or, with `prepared`, the result of `prepare_bias`.
        proj_weight: [C, num_heads * value_dim].
        scale, shift: [C].
        num_heads, key_dim: integers of 1 or more; value_dim follows from qkv_weight.
        eps: of the LayerNorm.
        prepared: whether the bias is a prepared one, which only the kernels take.
        backend: "auto", "eager" or "triton".

    Weights have x's dtype (any floating one under autocast), vectors and bias are float32 (float64 if x is).

    Returns:
        [B, N, C] in x's dtype.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape or backend, naming the argument.
        UnsupportedError: for backend="triton" where the kernels cannot run.
    """
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    check_attention(x, qkv_weight, qkv_bias, proj_weight, num_heads, key_dim, **norm, scale=scale, shift=shift)
    if prepared:
        check_accumulation_dtype("bias", bias, x)  # the kernels check its shape
    else:
        check_bias(bias, x, num_heads)
    arguments = (norm_weight, norm_bias, qkv_weight, qkv_bias, bias, proj_weight, scale, shift)
    if select_backend(backend, x, *arguments, norm=True, key_dim=key_dim, differentiable=not prepared) == "eager":
        if prepared:
            raise ValueError("prepared: got True, allowed is False where eager PyTorch computes")
        return reference.attention_mixer(x, *arguments, num_heads=num_heads, key_dim=key_dim, eps=eps)
    if needs_gradient(x, *arguments):
        return gradients.by_kernels("attention_mixer", (x, *arguments), (num_heads, key_dim, eps))
    from .kernels.attention_mixer import attention_mixer as kernel

    return kernel(x, *_in_products_dtype(x, *arguments), num_heads, key_dim, eps, prepared)


@torch.fx.wrap
def linear_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    *,
    activation: str = "gelu",
    eps: float = 1e-5,
    deterministic: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Second half of a 3D MetaBlock: x + scale2 * (W2 · act(W1 · LayerNorm(x) + shift1)) + shift2.

    scale2 and shift2 hold the layer scale and, times it, the second bias: see `fold_layer_scale` (paper section 4).

    Args:
        x: [B, N, C], floating.
        norm_weight, norm_bias: [C], of the LayerNorm.
        weight1, weight2: [hidden, C] and [C, hidden], x's dtype (any floating one under autocast).
        shift1: [hidden]; scale2, shift2: [C]; vectors are float32 (float64 if x is).
        activation: one of `ACTIVATIONS`; "gelu" is the exact form.
        eps: of the LayerNorm.
        deterministic: as for `conv_mlp`.
        backend: "auto", "eager" or "triton".

    Returns:
        [B, N, C] in x's dtype.

    Errors are those of `conv_mlp`.
    """
    check_tokens("x", x)
    check_choice("activation", activation, ACTIVATIONS)
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    check_mlp(x, x.shape[2], weight1, weight2, **norm, shift1=shift1, scale2=scale2, shift2=shift2)
    arguments = (norm_weight, norm_bias, weight1, shift1, weight2, scale2, shift2)
    if select_backend(backend, x, *arguments, activation=activation, norm=True, differentiable=True) == "eager":
        return reference.linear_mlp(x, *arguments, activation=activation, eps=eps)
    if needs_gradient(x, *arguments):
        return gradients.by_kernels("linear_mlp", (x, *arguments), (activation, eps), deterministic)
    from .kernels.linear_mlp import linear_mlp as kernel

    return kernel(x, *_in_products_dtype(x, *arguments), activation, eps, deterministic)


@torch.fx.wrap
def head(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """The network's end: the mean of LayerNorm(x) over the tokens and, given its weight, a linear layer on it.

    The network returns the mean of its two heads: that is one head, with the mean of their weights and biases.

    Args:
        x: [B, N, C], floating.
        norm_weight, norm_bias: [C], of the LayerNorm, float32 (float64 if x is).
        weight: [classes, C], x's dtype (any floating one under autocast), or None for the pooled features.
        bias: [classes], float32 (float64 if x is), with a weight; None without.
        eps: of the LayerNorm.
        backend: "auto", "eager" or "triton".

    Returns:
        [B, classes], or [B, C] without a weight, in x's dtype.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape or backend, naming the argument.
        UnsupportedError: for backend="triton" where the kernels cannot run.
    """
    check_tokens("x", x)
    channels = x.shape[2]
    check_vectors(x, channels, norm_weight=norm_weight, norm_bias=norm_bias)
    if (weight is None) != (bias is None):
        given = "bias" if weight is None else "weight"
        raise ValueError(f"{given}: got it alone, allowed are weight and bias together, or neither")
    arguments: tuple[Tensor, ...] = (x, norm_weight, norm_bias)
    if weight is not None and bias is not None:
        check_weight("weight", weight, x, outputs=None, inputs=channels, outputs_name="classes")
        check_vectors(x, weight.shape[0], bias=bias)
        arguments += (weight, bias)
    if select_backend(backend, *arguments, products=weight is not None, norm=True) == "eager":
        return reference.head(x, norm_weight, norm_bias, weight, bias, eps=eps)
    from .kernels.head import head as kernel

    weight = None if weight is None else weight.to(products_dtype(x))
    return kernel(x, norm_weight, norm_bias, weight, bias, eps)
