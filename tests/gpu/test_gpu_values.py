"""NaN and infinities, at every place of small maps and tokens: they must come out where float64 has them."""

from __future__ import annotations

import pytest
import torch
from machine import DTYPES, REHEARSED, check, id_of, prepared

from effformer.testing import (
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
VALUES = [float("nan"), float("inf"), -float("inf")]
CHANNELS = [48, 232] if REHEARSED else [48, 96, 224, 240]
SIDES = [(3, 4), (1, 3)] if REHEARSED else [(7, 7), (3, 50), (1, 9), (9, 1), (2, 2)]
TOKENS = [10] if REHEARSED else [49, 70, 150]
HEADS = {"num_heads": 2, "key_dim": 16, "value_dim": 24}


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("sides", SIDES, ids=lambda sides: "x".join(map(str, sides)))
def test_maps(sides: tuple[int, int], channels: int, value: float, dtype: torch.dtype) -> None:
    """An image for each place, spoiled there in one channel, a different one each time."""
    height, width = sides
    x = draw_map((height * width, channels, height, width), dtype)
    for place in range(height * width):
        x[place, 7 * place % channels, place // width, place % width] = value
    for case in (pool_mixer_case(x), conv_mlp_case(x, 2 * channels), meta4d_case(x, 2 * channels)):
        check(case)
    check(meta4d_case(x, 2 * channels, "relu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_tokens(tokens: int, value: float, dtype: torch.dtype) -> None:
    """An image for each token, spoiled there: it spoils itself in an MLP, all in attention."""
    x = torch.randn(tokens, tokens, 48).to(dtype)
    for place in range(tokens):
        x[place, place, 7 * place % 48] = value
    check(linear_mlp_case(x, 100))
    check(head_case(x, 20))
    check(attention_mixer_case(x, **HEADS))


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_attention(tokens: int, part: str, value: float, dtype: torch.dtype) -> None:
    """An image for each token, whose query, key or value in the second head is spoiled."""
    case = bias_attention_case(tokens, tokens, dtype, **HEADS)
    first, size = {"query": (56, 16), "key": (72, 16), "value": (88, 24)}[part]
    for place in range(tokens):
        case.arguments[0][place, place, first + 7 * place % size] = value
    check(case)
    check(prepared(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_bias(tokens: int, value: float, dtype: torch.dtype) -> None:
    """A bias of -inf masks a key; one of inf, or NaN, spoils a query. A query with no key left is NaN."""
    case = bias_attention_case(2, tokens, dtype, **HEADS)
    bias = case.arguments[1]
    for query in range(0, tokens, 2):
        bias[0, query, 3 * query % tokens] = value
    bias[1, tokens - 1] = value
    bias[1, :, : tokens // 2] = -float("inf")
    check(case)
    check(prepared(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=id_of)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_weights_and_vectors(channels: int, value: float, dtype: torch.dtype) -> None:
    """One spoiled entry of each argument in turn, in the last row, column and entry, where masks are."""
    case = meta4d_case(draw_map((2, channels, 5, 3), dtype), channels + 5)
    for index, argument in enumerate(case.arguments[1:], 1):
        spoiled = argument.clone()
        spoiled.view(-1)[-1] = value
        arguments = (*case.arguments[:index], spoiled, *case.arguments[index + 1 :])
        check(type(case)(case.operation, arguments, case.options))
