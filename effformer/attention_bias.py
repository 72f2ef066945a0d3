"""The attention bias as an argument of the fused operations; `effformer.ops` offers these functions."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .backend import refuse_triton, why_not_triton
from .checks import check_bias, check_choice, check_count, check_floating, check_tokens, shape_of
from .config import BIAS_RESIZES


def expand_bias(table: Tensor, height: int, width: int, resolution: int, resize: str = "table") -> Tensor:
    """The attention bias of a [height, width] map of tokens from its learned table; it is not cached.

    Args:
        table: [num_heads, resolution**2], floating; entry dy * resolution + dx belongs to the offset (dy, dx).
        height, width: sides of the map, 1 or more.
        resolution: side T of the table.
        resize: the way to a map that is not [T, T]. "table" resamples the table in offset space (bilinear, corners
            aligned). For compatibility, "matrix-bilinear" (NetsPresso) and "matrix-bicubic" (the original dense
            variant) resize the expanded [T * T, T * T] matrix as an image.

    Returns:
        [num_heads, N, N] with N = height * width, float32 (float64 if the table is). Differentiable in `table`.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape or `resize`, naming the argument.
    """
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        check_floating("table", table)
        check_choice("resize", resize, BIAS_RESIZES)
        if table.ndim != 2 or table.shape[1] != resolution**2:
            raise ValueError(f"table: got shape {shape_of(table)}, allowed is [num_heads, {resolution**2}]")
    return reference.expand_bias(reference.upcast(table), height, width, resolution=resolution, resize=resize)


def prepare_bias(bias: Tensor, *, key_dim: int, value_dim: int, dtype: torch.dtype) -> Tensor:
    """Prepare a bias that stays the same over many calls for the kernels of `attention_mixer`.

    It saves them a division, a bound and a mask. The result is for one number of tokens, one dtype, one GPU and its
    tile sizes.

    Args:
        bias: [num_heads, N, N], float32.
        key_dim, value_dim: of the attention.
        dtype: of the attention's products: float16, bfloat16 or float32.

    Raises:
        TypeError, ValueError: for a bias of another shape or dtype, or dimensions below 1.
        UnsupportedError: where the kernels cannot run.
    """
    check_tokens("bias", bias)
    check_bias(bias, bias[:1].mT, bias.shape[0])
    check_count("key_dim", key_dim, least=1)
    check_count("value_dim", value_dim, least=1)
    refuse_triton("triton", why_not_triton(bias.device, dtype, asked_for=True))
    from .kernels.bias_attention import prepare_bias as prepare

    return prepare(bias, key_dim, value_dim, dtype)
