"""Checks of values and tensors: each error names the argument, the value that came and the values allowed.

This module imports without torch, since the command line checks its options before it loads torch.
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


# --- values -----------------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """A condition on a value, and its wording in errors."""

    allowed: str
    holds: Callable[[Any], bool]


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0]


def as_int(value: Any) -> int | None:
    """`value` as a Python integer, None where it is no integer.

    Integers are Python's, NumPy's, and those in arrays and tensors without dimensions; True and False are not.
    """
    if type(value) is int:
        return value
    boolean = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    if boolean or getattr(value, "ndim", 0) != 0:
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # no integer; a tensor without memory
        return None


def as_number(value: Any) -> int | float | None:
    """`value` as a Python integer or float, None where it is neither; NumPy's and tensors count as in `as_int`."""
    if (whole := as_int(value)) is not None:
        return whole
    if isinstance(value, float):
        return float(value)
    dtype = getattr(value, "dtype", None)
    floating = getattr(dtype, "kind", "") == "f" or getattr(dtype, "is_floating_point", False)  # NumPy's, PyTorch's
    try:
        return float(value) if floating and value.ndim == 0 else None
    except RuntimeError:  # a tensor without memory
        return None


def is_int(value: Any) -> bool:
    """Whether `value` is an integer, as `as_int` says."""
    return as_int(value) is not None


def is_number(value: Any) -> bool:
    """Whether `value` is an integer or a float, as `as_number` says."""
    return as_number(value) is not None


def plain(value: Any) -> Any:
    """`value` without NumPy and tensors: each number in it, or in a tuple, as Python's; others as they are."""
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    number = as_number(value)
    return value if number is None else number


def one_of(names: Iterable[str]) -> Rule:
    """The rule that a value is one of these strings."""
    choices = tuple(names)
    return Rule("one of " + ", ".join(choices), lambda value: isinstance(value, str) and value in choices)


POSITIVE_INT = Rule("an integer of 1 or more", lambda value: is_int(value) and value >= 1)
COUNT = Rule("an integer of 0 or more", lambda value: is_int(value) and value >= 0)
POSITIVE = Rule("a number above 0", lambda value: is_number(value) and 0 < value < math.inf)
PROBABILITY = Rule("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
FINITE = Rule("a finite number", lambda value: is_number(value) and math.isfinite(value))


def wrong(field: str, value: Any, allowed: str) -> str:
    """The message for a wrong value."""
    return f"{field}: got {value!r} ({type(value).__name__}), allowed is {allowed}"


def unknown_key(key: Any, allowed: Iterable[str]) -> str:
    """The message for an unknown key, with the likeliest intended one."""
    choices = list(allowed)
    close = difflib.get_close_matches(str(key), choices, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{key}: unknown key{hint}, allowed are {', '.join(choices)}"


def key_problems(mapping: Mapping[Any, Any], allowed: Iterable[str], prefix: str = "") -> Iterable[str]:
    """A line for each key of `mapping` that is not in `allowed`, and for each of `allowed` that it lacks."""
    allowed = tuple(allowed)
    yield from (prefix + unknown_key(key, allowed) for key in mapping if key not in allowed)
    yield from (f"{prefix}{key}: missing" for key in allowed if key not in mapping)


def check_choice(argument: str, value: Any, choices: Iterable[str]) -> None:
    """Raise a ValueError that names the argument unless `value` is one of `choices`."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(wrong(argument, value, one_of(choices).allowed))


def check(argument: str, value: Any, rule: Rule) -> Any:
    """Raise a ValueError that names the argument unless `value` keeps the rule; returns it, as `plain` does."""
    if not rule.holds(value):
        raise ValueError(wrong(argument, value, rule.allowed))
    return plain(value)


def check_count(argument: str, value: Any, *, least: int = 0) -> int:
    """Raise a ValueError that names the argument unless `value` is an integer of `least` or more; returns it."""
    number = as_int(value)
    if number is None or number < least:
        raise ValueError(wrong(argument, value, f"an integer of {least} or more"))
    return number


def check_shapes(shapes: Iterable[Any]) -> list[tuple[int, int, int]]:
    """Raise a ValueError that names `shapes` unless each is (batch, height, width); returns them."""
    found = []
    for shape in shapes:
        if not isinstance(shape, Sequence) or len(shape) != 3:
            raise ValueError(f"shapes: got {shape}, allowed are (batch, height, width)")
        batch, height, width = (check_count("shapes", size, least=1) for size in shape)
        found.append((batch, height, width))
    return found


# --- tensors: a TypeError for a wrong dtype, a ValueError for a wrong shape or device ---------------------------------


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


def check_products_dtype(name: str, value: Tensor, x: Tensor) -> None:
    """x's dtype, or any floating one under autocast."""
    check_floating(name, value)
    if value.dtype != x.dtype:
        from .backend import autocast  # which imports torch

        if not autocast(x.device.type):
            raise TypeError(f"{name}: got {value.dtype}, allowed is x's {x.dtype} (or any floating dtype in autocast)")


def check_accumulation_dtype(name: str, value: Tensor, x: Tensor) -> None:
    """float32, or float64 where x is; on x's device."""
    check_device(name, value, x)
    size = 8 if x.dtype.itemsize == 8 else 4
    if value.dtype.itemsize != size or not value.is_floating_point():
        raise TypeError(f"{name}: got {value.dtype}, allowed is torch.float{8 * size} with an input of {x.dtype}")


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
    check_device(name, weight, x)
    check_products_dtype(name, weight, x)


def check_mlp(x: Tensor, channels: int, weight1: Tensor, weight2: Tensor, **vectors: Tensor) -> None:
    """[hidden, C] and [C, hidden]; `vectors` ending in 1 belong to the hidden channels, the others to C channels."""
    check_weight("weight1", weight1, x, outputs=None, inputs=channels, outputs_name="hidden")
    hidden = weight1.shape[0]
    check_weight("weight2", weight2, x, outputs=channels, inputs=hidden, outputs_name="channels")
    for name, vector in vectors.items():
        check_vectors(x, hidden if name.endswith("1") else channels, **{name: vector})


def check_attention(
    x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor, heads: int, key_dim: int, **vectors: Tensor
) -> None:
    """Tokens x [B, N, C], and weights of an attention with so many heads; other `vectors` are [C]."""
    check_tokens("x", x)
    channels, qkv_channels = x.shape[2], qkv_weight.shape[0]
    check_weight("qkv_weight", qkv_weight, x, outputs=None, inputs=channels, outputs_name="qkv channels")
    check_heads(qkv_channels, heads, key_dim)
    values = qkv_channels - 2 * heads * key_dim
    check_weight("proj_weight", proj_weight, x, outputs=channels, inputs=values, outputs_name="channels")
    check_vectors(x, channels, **vectors)
    check_vectors(x, qkv_channels, qkv_bias=qkv_bias)


def check_conv_norm(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, border: Tensor | None) -> Tensor:
    """All tensors of `conv_norm`; returns the one that gives the output its dtype."""
    if x.ndim != 4:
        raise ValueError(f"x: got shape {shape_of(x)}, allowed is [B, C, H, W]")
    if weight.ndim != 4 or tuple(weight.shape[1:]) != (x.shape[1], 3, 3):
        raise ValueError(f"weight: got shape {shape_of(weight)}, allowed is [outputs, {x.shape[1]}, 3, 3]")
    check_floating("weight", weight)
    check_device("weight", weight, x)
    pixels = str(x.dtype) == "torch.uint8"
    if pixels != (border is not None):
        got = "None" if border is None else f"shape {shape_of(border)}"
        raise ValueError(f"border: got {got} with x in {x.dtype}, allowed is [C] with uint8 x, and else None")
    like = weight if pixels else x
    check_floating("x", like)
    check_products_dtype("weight", weight, like)
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
