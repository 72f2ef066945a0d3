"""The fused operations: their arguments, the checks, and the choice of who computes them.

    "eager"   `effformer.reference`, differentiable, any device and floating dtype
    "triton"  the kernels, or an `UnsupportedError`; never something else silently
    "auto"    Triton where it can run, eager elsewhere; `why_not_triton` says why

Scales, shifts, layer scales and bias are float32, or float64 when x is; the output has x's dtype. The functions of
tensors are `torch.fx.wrap`ped, so that FX keeps them whole; call them as `ops.name`, since FX does not see an imported
bare name.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.fx
from torch import Tensor

from . import reference
from .config import BIAS_RESIZES, check_choice

Backend = Literal["auto", "eager", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)
ACTIVATIONS = tuple(reference.ACTIVATIONS)


class UnsupportedError(RuntimeError):
    """backend="triton" was asked for something that the kernels do not do."""


def why_not_triton(device: torch.device) -> str:
    """Why "auto" takes eager for tensors on `device`."""
    built = "the Triton kernels are not built yet"
    return built if device.type == "cuda" else f"{built}, and {device.type!r} is no NVIDIA GPU"


def select_backend(backend: str, device: torch.device) -> Literal["eager"]:
    """The implementation that `backend` stands for on `device`: eager, until the kernels are built.

    Raises:
        ValueError: for an unknown backend.
        UnsupportedError: for "triton".
    """
    check_choice("backend", backend, BACKENDS)
    refuse_triton(backend, why_not_triton(device))
    return "eager"


def refuse_triton(backend: str, reason: str) -> None:
    """Raise an UnsupportedError if `backend` is "triton": for `reason`, something else is about to compute."""
    if backend == "triton":
        raise UnsupportedError(f"backend='triton': {reason}")


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
    _check_map(x)
    _check_vectors(x, x.shape[1], layer_scale=layer_scale)
    match select_backend(backend, x.device):
        case "eager":
            return reference.pool_mixer(x, layer_scale)


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
    backend: str = "auto",
) -> Tensor:
    """1x1 convolutional MLP with its residual: x + scale2 * (W2 · act(scale1 * (W1 · x) + shift1)) + shift2.

    Scales and shifts hold the convolution's bias, BatchNorm in eval mode and the layer scale: see `fold_batch_norm`.

    Args:
        x: [B, C, H, W], floating.
        weight1, weight2: [hidden, C] and [C, hidden], x's dtype (any floating one under autocast).
        scale1, shift1: [hidden]; scale2, shift2: [C]; float32 (float64 if x is).
        activation: one of `ACTIVATIONS`; "gelu" is the exact form.
        backend: "auto", "eager" or "triton".

    Returns:
        [B, C, H, W] in x's dtype.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, activation or backend, naming the argument.
        UnsupportedError: for backend="triton" where the kernels cannot run.
    """
    _check_map(x)
    _check_mlp(x, weight1, scale1, shift1, weight2, scale2, shift2, activation)
    match select_backend(backend, x.device):
        case "eager":
            return reference.conv_mlp(x, weight1, scale1, shift1, weight2, scale2, shift2, activation=activation)


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
    backend: str = "auto",
) -> Tensor:
    """A whole 4D MetaBlock in eval mode: `conv_mlp(pool_mixer(x, layer_scale1), ...)`.

    Arguments, result and errors are those of `pool_mixer` and `conv_mlp`.
    """
    _check_map(x)
    _check_vectors(x, x.shape[1], layer_scale1=layer_scale1)
    _check_mlp(x, weight1, scale1, shift1, weight2, scale2, shift2, activation)
    match select_backend(backend, x.device):
        case "eager":
            return reference.meta4d(
                x, layer_scale1, weight1, scale1, shift1, weight2, scale2, shift2, activation=activation
            )


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
    _check_floating("qkv", qkv)
    if qkv.ndim != 3:
        raise ValueError(f"qkv: got shape {_shape(qkv)}, allowed is [B, N, channels]")
    tokens, channels = qkv.shape[1:]
    if num_heads < 1 or key_dim < 1 or channels % num_heads or channels // num_heads <= 2 * key_dim:
        raise ValueError(
            f"qkv: got {channels} channels with num_heads={num_heads} and key_dim={key_dim}, "
            "allowed is num_heads * (2 * key_dim + value_dim) with value_dim of 1 or more"
        )
    _check_shape("bias", bias, (num_heads, tokens, tokens))
    _check_accumulation_dtype("bias", bias, qkv)
    match select_backend(backend, qkv.device):
        case "eager":
            return reference.bias_attention(qkv, bias, num_heads=num_heads, key_dim=key_dim)


@torch.fx.wrap
def expand_bias(table: Tensor, height: int, width: int, *, resolution: int, resize: str = "table") -> Tensor:
    """The attention bias of a [height, width] map of tokens from its learned table. Nothing is cached.

    Args:
        table: [num_heads, resolution**2], floating; entry dy * resolution + dx belongs to the offset (dy, dx).
        height, width: sides of the map, 1 or more.
        resolution: side T of the table.
        resize: what happens where the map is not [T, T]. "table" resamples the table in offset space (bilinear,
            corners aligned). "matrix-bilinear" and "matrix-bicubic" resize the expanded [T * T, T * T] matrix as an
            image, as NetsPresso and the original dense variant do; they exist for compatibility.

    Returns:
        [num_heads, N, N] with N = height * width, float32 (float64 if the table is). Differentiable in `table`.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape or `resize`, naming the argument.
    """
    _check_floating("table", table)
    check_choice("resize", resize, BIAS_RESIZES)
    if table.ndim != 2 or table.shape[1] != resolution**2:
        raise ValueError(f"table: got shape {_shape(table)}, allowed is [num_heads, {resolution**2}]")
    return reference.expand_bias(reference.upcast(table), height, width, resolution=resolution, resize=resize)


# How modules turn their parameters into the arguments above; wrapped here so that FX sees buffers as buffers.
fold_batch_norm = torch.fx.wrap(reference.fold_batch_norm)
upcast = torch.fx.wrap(reference.upcast)


@torch.fx.wrap
def check_images(x: Tensor, in_chans: int, weight: Tensor) -> Tensor:
    """`x` if it is a batch of images [B, in_chans, H, W] in the dtype of `weight`, else an error that says what came.

    Raises:
        TypeError: for a dtype that the network does not compute in (outside autocast).
        ValueError: for another shape.
    """
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"x: got shape {_shape(x)}, allowed is [B, {in_chans}, H, W]")
    _check_floating("x", x)
    if x.dtype != weight.dtype and not _autocast(x.device.type):
        raise TypeError(f"x: got {x.dtype}, allowed is the network's {weight.dtype} (any floating dtype in autocast)")
    return x


def _autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _shape(x: Tensor) -> str:
    return f"[{', '.join(map(str, x.shape))}]"


def _check_floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name}: got {x.dtype}, allowed is a floating dtype")


def _check_map(x: Tensor) -> None:
    _check_floating("x", x)
    if x.ndim != 4:
        raise ValueError(f"x: got shape {_shape(x)}, allowed is [B, C, H, W]")


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: got shape {_shape(x)}, allowed is [{', '.join(map(str, shape))}]")


def _check_accumulation_dtype(name: str, value: Tensor, x: Tensor) -> None:
    allowed = torch.float64 if x.dtype == torch.float64 else torch.float32
    if value.dtype != allowed:
        raise TypeError(f"{name}: got {value.dtype}, allowed is {allowed} with an input of {x.dtype}")


def _check_vectors(x: Tensor, size: int, **vectors: Tensor) -> None:
    for name, vector in vectors.items():
        _check_shape(name, vector, (size,))
        _check_accumulation_dtype(name, vector, x)


def _check_mlp(
    x: Tensor,
    weight1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    activation: str,
) -> None:
    check_choice("activation", activation, ACTIVATIONS)
    channels = x.shape[1]
    if weight1.ndim != 2 or weight1.shape[1] != channels:
        raise ValueError(f"weight1: got shape {_shape(weight1)}, allowed is [hidden, {channels}]")
    hidden = weight1.shape[0]
    _check_shape("weight2", weight2, (channels, hidden))
    for name, weight in (("weight1", weight1), ("weight2", weight2)):
        _check_floating(name, weight)
        if weight.dtype != x.dtype and not _autocast(x.device.type):
            raise TypeError(f"{name}: got {weight.dtype}, allowed is x's {x.dtype} (or any floating dtype in autocast)")
    _check_vectors(x, hidden, scale1=scale1, shift1=shift1)
    _check_vectors(x, channels, scale2=scale2, shift2=shift2)
