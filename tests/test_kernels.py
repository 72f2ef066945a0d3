"""Every fused operation on Triton against float64, by the accuracy rule, at the published networks' widths.

Sizes are chosen so that each launch has two whole tiles of rows and a part of one.
"""

from __future__ import annotations

from collections.abc import Callable

import machine
import pytest
import torch
from effformer.bench.offline.launches import network_launches
from effformer.kernels import launch
from effformer.kernels.attention_mixer import attention_mixer
from effformer.kernels.bias_attention import prepare_bias
from effformer.kernels.head import head_launches
from effformer.kernels.tiling.device import TARGETS
from machine import DTYPES, prepared

from effformer.testing import (
    LAYOUTS,
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

L1, L3, L7 = (48, 96, 224, 448), (64, 128, 320, 512), (96, 192, 384, 768)
WIDTHS = sorted({*L1, *L3, *L7})
SIZE = (2, 11, 13)  # 286 pixels: 2 tiles of 128 rows and 30 rows
pytestmark = pytest.mark.usefixtures("kernel_device", "many_rows")


def image(channels: int, dtype: torch.dtype, layout: str = "channels_last") -> torch.Tensor:
    batch, height, width = SIZE
    return draw_map((batch, channels, height, width), dtype, layout)


def check(case: Case, ulps: float = 0.0) -> None:
    """The accuracy rule, without its allowance of 2 ulp unless asked for: real widths need none."""
    machine.check(case, ulps)


# --- layouts -------------------------------------------------------------------------------------------------------------

MAP_CASES: dict[str, Callable[[torch.Tensor], Case]] = {
    "pool_mixer": pool_mixer_case,
    "conv_mlp": lambda x: conv_mlp_case(x, 2 * x.shape[1] + 3),
    "meta4d": lambda x: meta4d_case(x, 2 * x.shape[1] + 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [48, 240])  # one kernel; three
@pytest.mark.parametrize("operation", MAP_CASES)
def test_layouts(operation: str, channels: int, layout: str) -> None:
    case = MAP_CASES[operation](image(channels, torch.float16, layout))
    check(case, ulps=0.5)
    channels_last = layout in ("channels_last", "cropped")
    out = case.run("triton")
    assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_tokens_may_be_a_transposed_map() -> None:
    x = torch.randn(2, 64, 7, 10).half().flatten(2).transpose(1, 2)
    assert x.stride(2) == 70
    check(linear_mlp_case(x, 128), ulps=0.5)
    check(attention_mixer_case(x, num_heads=2, key_dim=16, value_dim=24), ulps=0.5)
    check(head_case(x, 20), ulps=0.5)
    out = linear_mlp_case(x, 128).run("triton")
    assert out.is_contiguous()


def test_attention_reads_strided_arguments() -> None:
    case = bias_attention_case(2, 70, torch.float16, num_heads=3, key_dim=16, value_dim=24)
    qkv, bias = case.arguments
    wide = torch.zeros(2, 140, 2 * qkv.shape[2], dtype=qkv.dtype)
    wide[:, ::2, 1::2] = qkv
    strided = Case(case.operation, (wide[:, ::2, 1::2], bias.mT.contiguous().mT), case.options)
    machine.same(strided.run("triton"), case.run("triton"))
    machine.same(prepared(strided).run("triton"), prepared(case).run("triton"))
    shared = Case(case.operation, (qkv[:1].expand(2, -1, -1), bias[:1].expand(3, -1, -1)), case.options)
    check(shared, ulps=0.5)


def test_weights_and_vectors_may_be_strided() -> None:
    case = meta4d_case(image(48, torch.float16), 96)
    strided = tuple(_strided(argument) for argument in case.arguments[1:])
    machine.same(Case("meta4d", (case.arguments[0], *strided), case.options).run("triton"), case.run("triton"))


def _strided(x: torch.Tensor) -> torch.Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


# --- activations and shapes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "silu", "swish", "hard_swish"])
def test_activations(activation: str, dtype: torch.dtype) -> None:
    check(meta4d_case(image(48, dtype), 192, activation), ulps=0.5)
    check(linear_mlp_case(torch.randn(2, 80, 48).to(dtype), 192, activation), ulps=0.5)


@pytest.mark.parametrize("scale", [1e-3, 1e-2, 30.0])
@pytest.mark.parametrize("channels", [48, 320])
def test_small_and_large_hidden_values_keep_their_digits(channels: int, scale: float) -> None:
    """GELU's approximation must hold in relation to the output, not only in absolute terms."""
    case = conv_mlp_case(image(channels, torch.float16) * scale, 2 * channels)
    x, weight1, scale1, shift1, weight2, scale2, shift2 = case.arguments
    arguments = (x, weight1, scale1, shift1 * scale, weight2, scale2, shift2 * 0)
    check(Case("conv_mlp", arguments, case.options))


@pytest.mark.parametrize("hidden", [1, 5, 63, 65, 130])
def test_hidden_sizes(hidden: int) -> None:
    for channels in (32, 250):
        check(meta4d_case(image(channels, torch.float16), hidden), ulps=1)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (2, 2), (1, 300), (300, 1)])
def test_maps_of_any_sides(size: tuple[int, int]) -> None:
    x = draw_map((3, 24, *size), torch.float16)
    check(pool_mixer_case(x), ulps=1)
    check(meta4d_case(x, 50), ulps=1)


def test_empty_batches() -> None:
    for case in (
        meta4d_case(draw_map((0, 48, 5, 5), torch.float16), 96),
        meta4d_case(draw_map((0, 320, 5, 5), torch.float16), 640),
        pool_mixer_case(draw_map((0, 48, 5, 5), torch.float16)),
        bias_attention_case(0, 9, torch.float16, num_heads=2, key_dim=4, value_dim=6),
        linear_mlp_case(torch.randn(0, 9, 48).half(), 96),
        attention_mixer_case(torch.randn(0, 9, 48).half(), num_heads=2, key_dim=4, value_dim=6),
        head_case(torch.randn(0, 9, 48).half(), 5),
        head_case(torch.randn(2, 9, 48).half(), 0),
        head_case(torch.randn(0, 9, 48).half()),
    ):
        assert case.run("triton").shape == case.run("eager").shape


@pytest.mark.parametrize(
    ("heads", "key_dim", "value_dim", "tokens"),
    [
        (1, 1, 1, 1),
        (3, 5, 7, 2),
        (12, 24, 40, 65),
        (1, 48, 320, 33),
        (2, 160, 130, 70),
        (1, 300, 20, 40),
        (2, 32, 128, 300),
    ],
)
def test_heads_of_any_size(heads: int, key_dim: int, value_dim: int, tokens: int) -> None:
    case = bias_attention_case(2, tokens, torch.float16, num_heads=heads, key_dim=key_dim, value_dim=value_dim)
    check(case, ulps=1)
    check(prepared(case), ulps=1)


def test_arguments_are_left_alone() -> None:
    for case in (
        meta4d_case(image(48, torch.float16), 96),
        meta4d_case(image(320, torch.float16), 96),
        bias_attention_case(2, 49, torch.float16, num_heads=2, key_dim=16, value_dim=24),
        attention_mixer_case(torch.randn(2, 9, 48).half(), num_heads=2, key_dim=16, value_dim=24),
        linear_mlp_case(torch.randn(2, 9, 48).half(), 96),
        head_case(torch.randn(2, 9, 48).half(), 96),
    ):
        before = [argument.clone() for argument in case.arguments]
        case.run("triton").fill_(torch.nan)
        assert all(torch.equal(one, other) for one, other in zip(before, case.arguments, strict=True))


# --- the published widths ---------------------------------------------------------------------------------------------


def skip_the_widest(channels: int, dtype: torch.dtype) -> None:
    if machine.INTERPRETED and channels > 448 and dtype == torch.float32:
        pytest.skip("two products, as at 320 to 448 channels, and interpreted twice as slow")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", WIDTHS)
def test_meta4d(channels: int, dtype: torch.dtype) -> None:
    skip_the_widest(channels, dtype)
    check(meta4d_case(image(channels, dtype), 4 * channels))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", WIDTHS)
def test_conv_mlp(channels: int, dtype: torch.dtype) -> None:
    """At twice the width: four times is what `test_meta4d` takes, most of whose kernels are the same."""
    skip_the_widest(channels, dtype)
    check(conv_mlp_case(image(channels, dtype), 2 * channels))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", WIDTHS)
def test_pool_mixer(channels: int, dtype: torch.dtype) -> None:
    check(pool_mixer_case(image(channels, dtype)), ulps=0.5)  # nothing between input and output is rounded


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [49, 150])  # one tile of keys; three, the last in part
def test_bias_attention(tokens: int, dtype: torch.dtype) -> None:
    case = bias_attention_case(2, tokens, dtype, num_heads=8, key_dim=32, value_dim=128)
    check(case, ulps=0.5)
    check(prepared(case), ulps=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "tokens"), [(448, 49), (512, 80), (768, 49)])
def test_attention_mixer(channels: int, tokens: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, tokens, channels).to(dtype)
    check(attention_mixer_case(x, num_heads=8, key_dim=32, value_dim=128))


def test_attention_mixer_with_a_prepared_bias() -> None:
    case = attention_mixer_case(torch.randn(2, 150, 64).half(), num_heads=2, key_dim=16, value_dim=24)
    bias = case.arguments[5]
    arguments = (*case.arguments[:5], prepare_bias(bias, 16, 24, torch.float16), *case.arguments[6:])
    result = attention_mixer(*arguments, 2, 16, 1e-5, prepared=True)
    assert accuracy(result, case.exact(), case.run("eager")).passes(0.5)
    with pytest.raises(
        ValueError, match=r"bias: got a prepared one of shape \[2, 150, 150\].*prepare it for 150 tokens"
    ):
        attention_mixer(*case.arguments, 2, 16, 1e-5, prepared=True)
    fewer = prepare_bias(bias[:, :149, :149], 16, 24, torch.float16)  # of as many tiles
    with pytest.raises(ValueError, match=r"bias: got a prepared one of shape \[2, 149, 1\d\d\]"):
        attention_mixer(*case.arguments[:5], fewer, *case.arguments[6:], 2, 16, 1e-5, prepared=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [448, 512, 768])
def test_linear_mlp(channels: int, dtype: torch.dtype) -> None:
    check(linear_mlp_case(torch.randn(3, 90, channels).to(dtype), 4 * channels))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [448, 512, 768])
def test_head(channels: int, dtype: torch.dtype) -> None:
    """One image, few and many: one kernel with a few classes a program, with many, and pooling apart; 2.3 token tiles."""
    for batch, classes, kernels in (
        (1, 21, ["head_kernel"]),
        (2, 150, ["head_kernel"]),
        (33, 150, ["token_mean_kernel", "linear_kernel"]),
        (3, None, ["token_mean_kernel"]),
    ):
        with launch.recorded() as launches:
            check(head_case(torch.randn(batch, 150 if batch < 3 else 49, channels).to(dtype), classes))
        assert [one.kernel.__name__ for one in launches] == kernels


def test_nothing_is_written_beyond_the_last_class() -> None:
    case = head_case(torch.randn(2, 9, 48).half(), 21)
    room = torch.full((200,), 7.0, dtype=torch.float16)
    launch.run(*head_launches(*case.arguments, case.options["eps"], out=room[:42].view(2, 21)))
    machine.same(room[:42].view(2, 21), case.run("triton"))
    assert (room[42:] == 7).all()


def test_tokens_that_do_not_exist_are_not_pooled() -> None:
    """Without an eps, a row of zeros would have an infinite scale."""
    case = head_case(torch.randn(2, 21, 40), 7)
    check(Case(case.operation, case.arguments, {"eps": 0.0}), ulps=1)


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("convolutions", [False, True])
@pytest.mark.parametrize("products", [False, True])
def test_float32_products(capability: int, convolutions: bool, products: bool) -> None:
    """TF32 where PyTorch's flag of that kind allows it. Else three TF32 products, but in the fused MLPs.

    Not on sm_100, where compilers read tensor memory too early.
    """
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    try:
        conv.fp32_precision = "tf32" if convolutions else "ieee"
        matmul.fp32_precision = "tf32" if products else "ieee"
        found = precisions(capability)
    finally:
        conv.fp32_precision, matmul.fp32_precision = before
    for (operation, kernel), precision in found.items():
        of_maps = "conv_norm", "conv_mlp", "meta4d", "meta4d_backward", "meta4d_train"
        allowed = convolutions if operation in of_maps else products
        unfused = "linear_kernel", "conv_norm_kernel", "bias_attention_kernel", "mlp_backward_kernel", "gram_kernel"
        threefold = kernel in unfused and capability != 100
        assert precision == {"tf32" if allowed else "tf32x3" if threefold else "ieee"}, (operation, kernel)
    kernels = {kernel for _, kernel in found}
    assert kernels >= {"linear_kernel", "conv_norm_kernel", "mlp_kernel", "bias_attention_kernel"}
    assert {operation for operation, kernel in found if kernel == "linear_kernel"} > {"meta4d", "linear_mlp"}


def precisions(capability: int) -> dict[tuple[str, str], set[str]]:
    """By operation and kernel."""
    found: dict[tuple[str, str], set[str]] = {}
    for operation, _, one in network_launches("efficientformer_l1", torch.float32, TARGETS[capability], batch=64):
        if "PRECISION" in one.constants:
            found.setdefault((operation, one.kernel.__name__), set()).add(one.constants["PRECISION"])
    return found
