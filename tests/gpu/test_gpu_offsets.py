"""Tensors of more than 2**31 elements, and grids of millions of programs. All memory around the tensor is NaN.

An offset cut to 32 bits lands in that NaN, or far outside. Rehearsed on a CPU with tensors of a few thousand elements.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from effformer.kernels.attention_mixer import attention_mixer_launches
from effformer.kernels.conv_mlp import conv_mlp_launches
from effformer.kernels.launch import Launch, run
from effformer.kernels.linear_mlp import linear_mlp_launches
from effformer.kernels.meta4d import meta4d_launches
from effformer.kernels.pool_mixer import pool_mixer_launch
from gpu_cases import HEADS
from machine import DTYPES, REHEARSED, finite, id_of, measured, room, same

from effformer.testing import (
    Case,
    accuracy,
    attention_mixer_case,
    bias_attention_case,
    conv_mlp_case,
    draw_map,
    head_case,
    linear_mlp_case,
    meta4d_case,
    pool_mixer_case,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernel_device")]
BIG = 2**16 if REHEARSED else 2**31
FAR = BIG + 64
NAN = float("nan")


def poison(elements: int, dtype: torch.dtype) -> None:
    """Fill memory with NaN and give it back to PyTorch, which hands it to the next allocation."""
    torch.full((elements,), NAN, dtype=dtype)


def far_apart(near: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NaN of the shape of `near`, its two images FAR elements apart, and the memory that holds it, all NaN."""
    storage = torch.full((FAR + near[0].numel(),), NAN, dtype=near.dtype)
    return storage.as_strided(near.shape, (FAR, *near.stride()[1:])), storage


# --- images that lie far apart --------------------------------------------------------------------------------------------


def map_cases(channels: int, dtype: torch.dtype) -> dict[str, Case]:
    x = draw_map((2, channels, 12, 12), dtype)
    return {
        "pool_mixer": pool_mixer_case(x),
        "conv_mlp": conv_mlp_case(x, 2 * channels),
        "meta4d": meta4d_case(x, 2 * channels),
    }


def launches_into(out: torch.Tensor, case: Case, x: torch.Tensor) -> list[Launch]:
    arguments = (x, *case.arguments[1:], *case.options.values())
    match case.operation:
        case "pool_mixer":
            return [pool_mixer_launch(*arguments, out)]
        case "conv_mlp":
            return conv_mlp_launches(*arguments, out=out)
        case "meta4d":
            return meta4d_launches(*arguments, out=out)
        case "linear_mlp":
            return linear_mlp_launches(*arguments, out=out)
    return attention_mixer_launches(*arguments, out=out)


def check_far_input(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The second image lies beyond 2**31 elements; returns the result and, filled with NaN again, `far_apart`."""
    near = case.arguments[0]
    room(3 * FAR * near.dtype.itemsize)
    expected = case.run("triton")
    finite(expected)
    x, storage = far_apart(near)
    x.copy_(near)
    same(Case(case.operation, (x, *case.arguments[1:]), case.options).run("triton"), expected)
    return expected, x.fill_(NAN), storage


def check_far(case: Case) -> None:
    """The second image of input and output, each in turn, lies beyond 2**31 elements."""
    near = case.arguments[0]
    expected, x, storage = check_far_input(case)
    run(*launches_into(x, case, near))
    same(x, expected)
    x.fill_(NAN)
    assert bool(storage.isnan().all()), "something was written between the images"


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize("channels", [48, 240])
@pytest.mark.parametrize("operation", ["pool_mixer", "conv_mlp", "meta4d"])
def test_maps_far_apart(operation: str, channels: int, dtype: torch.dtype) -> None:
    check_far(map_cases(channels, dtype)[operation])


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
def test_tokens_far_apart(dtype: torch.dtype) -> None:
    x = torch.randn(2, 80, 64).to(dtype)
    check_far(linear_mlp_case(x, 96))
    for classes in (None, 20):
        check_far_input(head_case(x, classes))
    check_far(attention_mixer_case(x, num_heads=2, key_dim=16, value_dim=24))


# --- tensors that are that big -----------------------------------------------------------------------------------------


def check_big(case: Callable[[torch.Tensor], Case], x: torch.Tensor, copies: int) -> None:
    """`x` has enough images to pass 2**31 elements. The first, some in the middle and the last are compared with float64.

    `copies`: how many tensors like x the operation may need at once, with x.
    """
    room(int(copies * x.numel() * x.dtype.itemsize))
    whole = case(x)
    poison((copies - 1) * x.numel(), x.dtype)
    result = whole.run("triton")
    half = len(x) // 2
    for images in (slice(0, 2), slice(half, half + 2), slice(len(x) - 2, len(x))):
        part = Case(whole.operation, (x[images], *whole.arguments[1:]), whole.options)
        found = accuracy(result[images], part.exact(), part.run("eager"))
        measured(whole.operation, result[images], found)
        assert found.passes(), (images, found)
    for images in result.split(max(1, len(x) // 16)):
        finite(images)


def big_map(channels: int, side: int, elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers in place, since a copy in float32 would be twice as large."""
    batch = elements // (channels * side * side) + 3
    room(2 * elements * dtype.itemsize)
    return torch.empty(batch, side, side, channels, dtype=dtype).normal_().permute(0, 3, 1, 2)


BIG_MAPS: dict[str, tuple[Callable[[torch.Tensor], Case], tuple[int, int, int, torch.dtype], int]] = {
    # one kernel: input and output beyond 2**31 elements
    "meta4d": (lambda x: meta4d_case(x, 192), (48, 56, BIG, torch.float16), 2),
    # two: the hidden activations
    "conv_mlp": (lambda x: conv_mlp_case(x, 960), (240, 7, BIG // 4, torch.float16), 6),
    # three: all of them, and the mixer's result
    "meta4d in three kernels": (lambda x: meta4d_case(x, 256), (240, 14, BIG, torch.float16), 5),
    "pool_mixer": (pool_mixer_case, (448, 7, BIG, torch.float32), 2),
}


@pytest.mark.parametrize("name", BIG_MAPS)
def test_big_maps(name: str) -> None:
    case, (channels, side, elements, dtype), copies = BIG_MAPS[name]
    check_big(case, big_map(channels, 3 if REHEARSED else side, elements, dtype), copies)


def big_tokens(tokens: int, channels: int, elements: int) -> torch.Tensor:
    room(2 * 2 * elements)
    return torch.empty(elements // (tokens * channels) + 3, tokens, channels, dtype=torch.float16).normal_()


def test_a_big_token_mlp() -> None:
    """Hidden activations beyond 2**31 elements."""
    tokens, channels = (5, 16) if REHEARSED else (49, 448)
    check_big(lambda x: linear_mlp_case(x, 4 * channels), big_tokens(tokens, channels, BIG // 4), 7)


def test_a_big_head() -> None:
    tokens, channels = (5, 16) if REHEARSED else (49, 448)
    check_big(lambda x: head_case(x, 20), big_tokens(tokens, channels, BIG), 2)


def test_a_big_attention_mixer() -> None:
    """q, k and v beyond 2**31 elements."""
    tokens, channels = (5, 16) if REHEARSED else (49, 448)
    qkv = HEADS["num_heads"] * (2 * HEADS["key_dim"] + HEADS["value_dim"])
    x = big_tokens(tokens, channels, BIG * channels // qkv)
    check_big(lambda x: attention_mixer_case(x, **HEADS), x, 3 + 2 * qkv // channels)


def test_a_big_attention() -> None:
    """Its output, too, beyond 2**31 elements."""
    tokens = 5 if REHEARSED else 49
    small = bias_attention_case(1, tokens, torch.float16, **HEADS)
    qkv = big_tokens(tokens, small.arguments[0].shape[2], BIG * 3 // 2)
    check_big(lambda x: Case(small.operation, (x, *small.arguments[1:]), small.options), qkv, 2)


def test_a_big_bias() -> None:
    """So many tokens that the bias has more than 2**31 elements; the last queries by hand, in float64."""
    tokens = 130 if REHEARSED else 16_500
    heads, key_dim, value_dim = HEADS.values()
    room(3 * heads * tokens * tokens * 4)
    poison(heads * tokens * tokens, torch.float32)
    bias = torch.empty(heads, tokens, tokens).normal_()
    qkv = torch.randn(1, tokens, heads * (2 * key_dim + value_dim)).half()
    case = Case("bias_attention", (qkv, bias), {"num_heads": heads, "key_dim": key_dim})
    result = case.run("triton").unflatten(2, (heads, value_dim))
    q, k, v = qkv[0].double().unflatten(1, (heads, -1)).transpose(0, 1).split([key_dim, key_dim, value_dim], dim=2)
    for queries in (slice(0, 3), slice(tokens - 3, tokens)):
        scores = q[:, queries] @ k.mT * key_dim**-0.5 + bias[:, queries].double()
        exact = (scores.softmax(2) @ v).transpose(0, 1)
        error = (result[0, queries].double() - exact).abs()
        assert error.max() <= 2e-3 * exact.abs().max(), error.max()
    finite(result)


# --- many rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["pool_mixer", "meta4d"])
def test_more_than_2_to_the_31_rows(operation: str) -> None:
    """Of two channels: rows are counted in 64 bits, programs are 16 million."""
    side = 8 if REHEARSED else 1024
    x = big_map(2, side, 2 * BIG, torch.float16)
    assert x.numel() // 2 > BIG
    check_big(pool_mixer_case if operation == "pool_mixer" else lambda x: meta4d_case(x, 8), x, 2)
