"""Checks of the operations' arguments: each error names the argument, what came and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import check_choice
from .reference import ACTIVATIONS


def autocast(device_type: str) -> bool:
    """Whether autocast is on for this kind of device, of those that the tests know it on."""
    return device_type in ("cuda", "cpu") and torch.is_autocast_enabled(device_type)


def products_dtype(x: Tensor) -> torch.dtype:
    """What matrix products are computed in for an input x: autocast's dtype where it is on, else x's."""
    return torch.get_autocast_dtype(x.device.type) if autocast(x.device.type) else x.dtype


def shape_of(x: Tensor) -> str:
    """A shape as error messages show it."""
    return f"[{', '.join(map(str, x.shape))}]"


def check_floating(name: str, x: Tensor) -> None:
    """A floating dtype."""
    if not x.is_floating_point():
        raise TypeError(f"{name}: got {x.dtype}, allowed is a floating dtype")


def check_map(x: Tensor) -> None:
    """[B, C, H, W]."""
    check_floating("x", x)
    if x.ndim != 4:
        raise ValueError(f"x: got shape {shape_of(x)}, allowed is [B, C, H, W]")


def check_tokens(name: str, x: Tensor) -> None:
    """[B, N, C]."""
    check_floating(name, x)
    if x.ndim != 3:
        raise ValueError(f"{name}: got shape {shape_of(x)}, allowed is [B, N, channels]")


def check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Exactly this shape."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: got shape {shape_of(x)}, allowed is [{', '.join(map(str, shape))}]")


def check_device(name: str, value: Tensor, x: Tensor) -> None:
    """On x's device."""
    if value.device != x.device:
        raise ValueError(f"{name}: got a tensor on {value.device}, allowed is x's device {x.device}")


def check_accumulation_dtype(name: str, value: Tensor, x: Tensor) -> None:
    """float32, or float64 where x is; on x's device."""
    check_device(name, value, x)
    allowed = torch.float64 if x.dtype == torch.float64 else torch.float32
    if value.dtype != allowed:
        raise TypeError(f"{name}: got {value.dtype}, allowed is {allowed} with an input of {x.dtype}")


def check_vectors(x: Tensor, size: int, **vectors: Tensor) -> None:
    """[size] each, in the accumulation dtype."""
    for name, vector in vectors.items():
        check_shape(name, vector, (size,))
        check_accumulation_dtype(name, vector, x)


def check_weight(name: str, weight: Tensor, x: Tensor, *, outputs: int | None, inputs: int, outputs_name: str) -> None:
    """[outputs, inputs] in x's dtype (any floating one under autocast); `outputs` None leaves their number free."""
    if weight.ndim != 2 or weight.shape[1] != inputs or outputs not in (None, weight.shape[0]):
        allowed = outputs_name if outputs is None else outputs
        raise ValueError(f"{name}: got shape {shape_of(weight)}, allowed is [{allowed}, {inputs}]")
    check_floating(name, weight)
    check_device(name, weight, x)
    if weight.dtype != x.dtype and not autocast(x.device.type):
        raise TypeError(f"{name}: got {weight.dtype}, allowed is x's {x.dtype} (or any floating dtype in autocast)")


def check_conv_mlp(
    x: Tensor,
    weight1: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    weight2: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    activation: str,
) -> None:
    """Everything of `conv_mlp` but x's own shape."""
    check_choice("activation", activation, tuple(ACTIVATIONS))
    channels = x.shape[1]
    check_weight("weight1", weight1, x, outputs=None, inputs=channels, outputs_name="hidden")
    hidden = weight1.shape[0]
    check_weight("weight2", weight2, x, outputs=channels, inputs=hidden, outputs_name="channels")
    check_vectors(x, hidden, scale1=scale1, shift1=shift1)
    check_vectors(x, channels, scale2=scale2, shift2=shift2)


def check_conv_norm(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, activation: str | None, border: Tensor | None
) -> Tensor:
    """Everything of `conv_norm`; returns the tensor whose dtype the others must fit, and the output has."""
    if activation is not None:
        check_choice("activation", activation, tuple(ACTIVATIONS))
    if x.ndim != 4:
        raise ValueError(f"x: got shape {shape_of(x)}, allowed is [B, C, H, W]")
    if weight.ndim != 4 or tuple(weight.shape[1:]) != (x.shape[1], 3, 3):
        raise ValueError(f"weight: got shape {shape_of(weight)}, allowed is [outputs, {x.shape[1]}, 3, 3]")
    check_floating("weight", weight)
    check_device("weight", weight, x)
    pixels = x.dtype == torch.uint8
    if pixels != (border is not None):
        got = "None" if border is None else f"shape {shape_of(border)}"
        raise ValueError(f"border: got {got} with x in {x.dtype}, allowed is [C] with uint8 x, and else None")
    like = weight if pixels else x
    check_floating("x", like)
    if weight.dtype != like.dtype and not autocast(x.device.type):
        raise TypeError(f"weight: got {weight.dtype}, allowed is x's {x.dtype} (or any floating dtype in autocast)")
    check_vectors(like, weight.shape[0], scale=scale, shift=shift)
    if border is not None:
        check_vectors(like, x.shape[1], border=border)
    return like


def check_heads(channels: int, num_heads: int, key_dim: int) -> None:
    """A number of QKV channels that makes `num_heads` heads of q, k and at least one value."""
    if num_heads < 1 or key_dim < 1 or channels % num_heads or channels // num_heads <= 2 * key_dim:
        raise ValueError(
            f"qkv: got {channels} channels with num_heads={num_heads} and key_dim={key_dim}, "
            "allowed is num_heads * (2 * key_dim + value_dim) with value_dim of 1 or more"
        )


def check_bias(bias: Tensor, x: Tensor, num_heads: int) -> None:
    """[num_heads, N, N] for tokens x [B, N, ...], in the accumulation dtype."""
    check_shape("bias", bias, (num_heads, x.shape[1], x.shape[1]))
    check_accumulation_dtype("bias", bias, x)
