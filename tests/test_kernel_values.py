"""Special values and limits: NaN, infinities, denormals, GELU's forms far out, offsets beyond 2**31."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from effformer.kernels import activation
from effformer.kernels.activation import activate
from effformer.kernels.launch import run
from effformer.kernels.layout import map_rows
from effformer.kernels.linear import linear_launch
from effformer.kernels.meta4d import meta4d_launches
from effformer.kernels.pool_mixer import pool_mixer_launch
from effformer.kernels.rows import split
from effformer.kernels.tiling import device as devices
from effformer.kernels.tiling.choose import Question, attention_config, norm_config
from effformer.kernels.tiling.device import AMPERE, BLACKWELL, CONSUMER, HOPPER, Device, device_of, stand_in
from machine import DEVICE, DTYPES, ON_GPU, Prepared, check, prepared, room, same

from effformer import reference
from effformer.testing import (
    Case,
    attention_mixer_case,
    bias_attention_case,
    conv_mlp_case,
    draw_map,
    head_case,
    linear_mlp_case,
    meta4d_case,
    pool_mixer_case,
)

NAN, INF = float("nan"), float("inf")
pytestmark = pytest.mark.usefixtures("kernel_device", "many_rows")


# --- GELU -----------------------------------------------------------------------------------------------------------------


@triton.jit
def activate_kernel(x_ptr, out_ptr, N, FORM: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + n, mask=n < N, other=0.0)
    tl.store(out_ptr + n, activate(x, FORM), mask=n < N)


def evaluate(form: str, x: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(x, NAN)
    activate_kernel[(triton.cdiv(x.numel(), 4096),)](x, out, x.numel(), FORM=form, BLOCK=4096)
    return out.double() / activation.gain(form)


def scan() -> torch.Tensor:
    """float32 from -1e4 to 1e4: evenly, by powers from the denormals on, and both zeros."""
    even = torch.cat([torch.linspace(-8, 8, 60_001), torch.linspace(-1e4, 1e4, 20_001)])
    powers = torch.logspace(-44, 4, 20_000, dtype=torch.float64).float()
    return torch.cat([even, powers, -powers, torch.tensor([0.0, -0.0])])


@pytest.mark.parametrize("form", ["gelu_exp3", "gelu_exp3_x2"])
def test_gelu_forms_stay_within_what_they_claim(form: str) -> None:
    x = scan()
    error = (evaluate(form, x) - torch.nn.functional.gelu(x.double())).abs()
    assert (error <= 1.2e-4 * x.double().abs().clamp(max=1) + torch.finfo(torch.float32).tiny).all()
    assert error.max() > 1e-5  # not erf


def test_gelu_erf_is_exact_to_float32() -> None:
    x = scan()
    exact = torch.nn.functional.gelu(x.double())
    error = (evaluate("gelu_erf", x) - exact).abs()
    own = (torch.nn.functional.gelu(x).double() - exact).abs()
    assert error.max() <= 2 * own.max()
    assert (error <= 1.2e-7 * x.double().abs() + 1e-45).all()


@pytest.mark.parametrize("form", ["gelu_erf", "gelu_exp3", "gelu_exp3_x2", "relu", "silu", "hard_swish"])
def test_activations_of_what_is_not_finite(form: str) -> None:
    x = torch.tensor([NAN, INF, -INF, 0.0, 1e38, -1.0])
    name = form.partition("_exp3")[0].partition("_erf")[0]
    exact = reference.ACTIVATIONS[name](x.double())
    got = evaluate(form, x)
    assert torch.equal(got.isnan(), exact.isnan())
    assert torch.equal(got == INF, exact == INF)
    assert torch.equal(got == -INF, exact == -INF)


def test_the_coefficients_are_derived() -> None:
    pytest.importorskip("scipy")
    from effformer.bench.offline import fit_gelu

    found = fit_gelu.fit(3, activation.EXP3_CAP.value)
    assert np.allclose(found.coefficients, activation.EXP3.value, rtol=0, atol=1e-6)
    assert found.error < 1.17e-4
    assert fit_gelu.fit(3, 4.0).error >= found.error * 0.99  # no cap in the neighbourhood is better
    assert fit_gelu.fit(2, 3.875).error > 8 * found.error  # degree 2 would not do for float16


def test_forms_by_dtype() -> None:
    assert activation.form("gelu", torch.float32) == "gelu_erf"
    assert activation.form("gelu", torch.float16) == "gelu_exp3"
    assert activation.form("gelu", torch.bfloat16) == "gelu_exp3_x2"
    assert activation.form("swish", torch.float16) == activation.form("silu", torch.float32) == "silu"


def test_the_doubled_gelu_is_halved_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16's form, in float16: the interpreter has no bfloat16."""
    monkeypatch.setitem(activation._GELU, torch.float16, "gelu_exp3_x2")
    for channels in (48, 240):
        check(meta4d_case(draw_map((2, channels, 9, 11), torch.float16), 2 * channels))
    check(linear_mlp_case(torch.randn(2, 80, 48).half(), 100))


# --- values ---------------------------------------------------------------------------------------------------------------


def spoil(x: torch.Tensor) -> torch.Tensor:
    """Zeros, denormals and large values in many places, one NaN and one infinity in two."""
    flat = x.clone(memory_format=torch.contiguous_format).flatten()
    places = torch.randperm(flat.numel())
    tenth = flat.numel() // 10
    flat[places[:tenth]] = 0
    flat[places[tenth : 2 * tenth]] = torch.finfo(x.dtype).smallest_normal / 8
    flat[places[2 * tenth : 2 * tenth + 5]] = 300.0
    flat[places[-1]], flat[places[-2]] = NAN, INF
    return flat.reshape(x.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [48, 224, 240])
def test_special_values_in_maps(channels: int, dtype: torch.dtype) -> None:
    x = spoil(draw_map((2, channels, 11, 13), dtype))
    exact = pool_mixer_case(x).exact()
    assert exact.isnan().any()
    assert exact.isfinite().sum() > exact.numel() // 2  # NaN spreads to its neighbours, not to the whole tile
    for case in (pool_mixer_case(x), conv_mlp_case(x, 100), meta4d_case(x, 100)):
        check(case)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_infinity_at_every_place_of_a_small_map(value: float) -> None:
    """At an edge, nothing may be multiplied by a weight of zero: the neighbours of an infinity are infinite, not NaN."""
    for height, width in ((3, 4), (1, 3), (2, 1)):
        x = draw_map((height * width, 16, height, width), torch.float16)
        for place in range(height * width):
            x[place, 5, place // width, place % width] = value
        check(pool_mixer_case(x))
        check(meta4d_case(x, 20))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_in_tokens(dtype: torch.dtype) -> None:
    x = spoil(torch.randn(4, 40, 48).to(dtype))
    check(linear_mlp_case(x, 100))
    for classes in (None, 20):
        assert not head_case(x, classes).exact().isfinite().all()
        check(head_case(x, classes))
    check(attention_mixer_case(x, num_heads=2, key_dim=16, value_dim=24))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("channel", [3, 20, 50])  # of the second head's q, k, v
@pytest.mark.parametrize("tokens", [49, 150])
def test_special_values_in_attention(tokens: int, channel: int, value: float) -> None:
    case = bias_attention_case(2, tokens, torch.float16, num_heads=2, key_dim=16, value_dim=24)
    case.arguments[0][1, tokens - 2, 56 + channel] = value
    assert not case.exact().isfinite().all()
    check(case)
    check(prepared(case))


@pytest.mark.parametrize("tokens", [49, 150])
def test_bias_may_mask(tokens: int) -> None:
    case = bias_attention_case(2, tokens, torch.float16, num_heads=2, key_dim=16, value_dim=24)
    bias = case.arguments[1]
    bias[0, :, : tokens // 2] = -INF  # all keys of the first tile, where there are several
    bias[1, 3] = -INF  # a query that may look at nothing: NaN
    bias[1, 5, 7] = NAN
    bias[1, 6, 7] = INF
    exact = case.exact()
    assert exact[:, [3, 5, 6], 24:].isnan().all()
    assert exact[..., :24].isfinite().all()
    check(case)
    check(prepared(case))


@pytest.mark.parametrize("mask", [torch.finfo(torch.float32).min, -1e38])
@pytest.mark.parametrize("tokens", [49, 150])
def test_finite_masks_stay_finite(tokens: int, mask: float) -> None:
    """A query for which all keys are masked by a large finite number attends to all of them alike."""
    case = bias_attention_case(2, tokens, torch.float32, num_heads=2, key_dim=16, value_dim=24)
    case.arguments[1][1, 3] = mask
    case.arguments[1][0, :, 5:9] = mask
    assert case.exact().isfinite().all()
    check(case)
    check(prepared(case))


@pytest.mark.parametrize("tokens", [49, 150])
def test_large_scores_do_not_overflow(tokens: int) -> None:
    case = bias_attention_case(2, tokens, torch.float16, num_heads=2, key_dim=16, value_dim=24)
    case.arguments[1].mul_(1e4)
    assert case.exact().isfinite().all()
    check(case)
    check(prepared(case))


def test_hidden_values_may_exceed_half_of_float16() -> None:
    case = conv_mlp_case(draw_map((1, 48, 3, 3), torch.float16), 32)
    _, _, _, shift1, weight2, *_ = case.arguments
    shift1.fill_(5e4)
    weight2.mul_(0.01)
    assert case.run("eager").isfinite().all()
    check(case)


# --- offsets beyond 2**31 ---------------------------------------------------------------------------------------------------

FAR = 2**31 + 64


def far_apart(shape: tuple[int, int, int, int]) -> torch.Tensor:
    """[2, C, H, W] channels_last, its two images FAR elements apart: 4 GiB of addresses, hardly any memory."""
    _, channels, height, width = shape
    return far_storage(channels * height * width).as_strided(shape, (FAR, 1, width * channels, channels))


def far_storage(more: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """FAR elements and `more`."""
    room(2 * FAR * dtype.itemsize)
    return torch.empty(FAR + more, dtype=dtype)


def test_offsets_beyond_32_bits() -> None:
    shape, near = (2, 48, 12, 12), draw_map((2, 48, 12, 12), torch.float16)
    x, out = far_apart(shape), far_apart(shape)
    x.copy_(near)
    case = meta4d_case(near, 96)
    layer_scale, *mlp = case.arguments[1:]
    same(Case("meta4d", (x, layer_scale, *mlp), case.options).run("triton"), case.run("triton"))

    out.fill_(NAN)
    run(pool_mixer_launch(x, layer_scale, out))
    same(out, Case("pool_mixer", (near, layer_scale)).run("triton"))

    out.fill_(NAN)
    (launch,) = meta4d_launches(x, layer_scale, *mlp, "gelu", out=out)
    assert launch.question == ("meta4d", torch.float16, (48, 288))
    run(launch)
    same(out, case.run("triton"))

    out.fill_(NAN)
    weight, shift = torch.eye(48).half(), torch.zeros(48)
    run(linear_launch(map_rows(x), weight, None, shift, map_rows(out), residual=map_rows(x)))
    same(out, 2 * near)


@pytest.mark.parametrize("far", ["lines", "columns", "channels", "dense rows"])
def test_any_stride_may_be_far(far: str) -> None:
    """The last of the lines, columns, channels or rows lies beyond 2**31 elements."""
    shape = (2, 3, 6, 5) if far != "dense rows" else (1, 3, 1, 40)
    near = draw_map(shape, torch.float16)
    _, channels, height, width = shape
    strides = {
        "lines": (FAR // max(height - 1, 1), channels, 1),
        "columns": (channels, FAR // (width - 1), 1),
        "channels": (width, 1, FAR // (channels - 1)),
        "dense rows": (0, FAR // (width - 1), 1),
    }[far]
    step = 200 if far != "dense rows" else 0
    x = far_storage(1000).as_strided(shape, (step, strides[2], strides[0], strides[1]))
    x.copy_(near)
    for case in (pool_mixer_case(near), meta4d_case(near, 9)):
        same(Case(case.operation, (x, *case.arguments[1:]), case.options).run("triton"), case.run("triton"))


@pytest.mark.parametrize("far", ["images", "tokens", "channels"])
@pytest.mark.parametrize("tokens", [49, 150])
def test_attention_offsets_beyond_32_bits(tokens: int, far: str) -> None:
    case = bias_attention_case(2, tokens, torch.float16, num_heads=2, key_dim=16, value_dim=24)
    near, bias = case.arguments
    channels = near.shape[2]
    strides = {
        "images": (FAR, channels, 1),
        "tokens": (channels, FAR // min(tokens - 1, 127), 1),  # the second tile of queries begins beyond them, too
        "channels": (tokens, 1, FAR // (channels - 1)),
    }[far]
    x = far_storage(near.numel() + max(tokens - 128, 0) * strides[1]).as_strided(near.shape, strides)
    x.copy_(near)
    same(Case("bias_attention", (x, bias), case.options).run("triton"), case.run("triton"))
    same(Prepared("bias_attention", (x, bias), case.options).run("triton"), prepared(case).run("triton"))


@pytest.mark.parametrize("far", ["images", "tokens"])
def test_head_offsets_beyond_32_bits(far: str) -> None:
    near = torch.randn(2, 70, 24).half()
    strides = (FAR, 24, 1) if far == "images" else (24, FAR // 69, 1)
    x = far_storage(near.numel()).as_strided(near.shape, strides)
    x.copy_(near)
    for classes in (None, 20):
        case = head_case(near, classes)
        same(Case("head", (x, *case.arguments[1:]), case.options).run("triton"), case.run("triton"))


def test_bias_offsets_beyond_32_bits() -> None:
    case = bias_attention_case(1, 9, torch.float32, num_heads=3, key_dim=4, value_dim=6)
    qkv, bias = case.arguments
    storage = far_storage(300, torch.float32)
    for strides in ((FAR // 2, 9, 1), (100, FAR // 8, 1)):
        far = storage.as_strided(bias.shape, strides)
        far.copy_(bias)
        same(Case("bias_attention", (qkv, far), case.options).run("triton"), case.run("triton"))


# --- limits that are errors -----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="x: got a map of 65536x32768, allowed are 2147479552 pixels an image"):
        map_rows(torch.empty(1, device="meta").expand(1, 1, 65536, 32768))
    with pytest.raises(ValueError, match="x: got 40000 channels, allowed are 32768 for LayerNorm"):
        head_case(torch.zeros(1, 1, 40_000).half(), 2).run("triton")
    with pytest.raises(ValueError, match="x: got 40000 channels, allowed are 32768 for LayerNorm"):
        norm_config(Question("layer_norm", torch.float16, (40_000, 1)), HOPPER)
    with pytest.raises(ValueError, match="key_dim: got 2000, allowed are up to 1816 in torch.float16"):
        attention_config(Question("bias_attention", torch.float16, (49, 2000)), HOPPER)


# --- pieces ---------------------------------------------------------------------------------------------------------------


def test_channels_split_without_waste() -> None:
    for channels in (16, 32, 48, 64, 96, 128, 192, 224, 320, 384, 448, 512, 768):
        assert sum(split(channels)) == channels, channels
    for channels in range(1, 1025):
        widths = split(channels)
        assert len(widths) <= 3
        assert all(width >= 16 and width & (width - 1) == 0 for width in widths)
        assert sorted(set(widths), reverse=True) == list(widths)
        assert channels <= sum(widths) < max(1.34 * channels, channels + 16)


@pytest.mark.parametrize("device", [AMPERE, CONSUMER, HOPPER, BLACKWELL])
def test_configurations_for_other_devices_compute_the_same(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, as far as its shared memory goes."""
    if ON_GPU:
        if device.shared_memory > device_of(DEVICE).shared_memory:
            pytest.skip("more shared memory than this GPU has")
        monkeypatch.setattr(devices, "_cuda_device", lambda index: device)
    with stand_in(device):
        for channels in (48, 224, 320):
            check(meta4d_case(draw_map((2, channels, 9, 11), torch.float16), 2 * channels))
        check(attention_mixer_case(torch.randn(2, 80, 48).half(), num_heads=2, key_dim=16, value_dim=24))
        check(prepared(bias_attention_case(2, 80, torch.float16, num_heads=2, key_dim=16, value_dim=24)))
