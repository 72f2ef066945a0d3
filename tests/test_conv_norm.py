"""The convolution of the stem and the downsamplings: reference, arguments, kernel, and the vendor's library."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import machine
import pytest
import torch
from effformer.kernels import conv_norm
from effformer.kernels.launch import recorded
from effformer.kernels.tiling import choose as config
from effformer.kernels.tiling.device import BLACKWELL, CLASSES, HOPPER
from effformer.kernels.tiling.table import DTYPES as TABLE_DTYPES
from effformer.kernels.tiling.table import Entry
from test_kernel_values import FAR, far_storage
from torch import Tensor

from effformer import ops, reference
from effformer.testing import LAYOUTS, Case, conv_norm_case, draw_map

pytestmark = pytest.mark.usefixtures("kernel_device")
NAN, INF = math.nan, math.inf


def check(case: Case, ulps: float = 0.5) -> None:
    machine.check(case, ulps)


def pixels(batch: int, height: int, width: int, channels: int = 3) -> Tensor:
    """uint8 [B, C, H, W] that lie as [B, H, W, C], all values among them."""
    return torch.randint(0, 256, (batch, height, width, channels), dtype=torch.uint8).permute(0, 3, 1, 2)


# --- specification --------------------------------------------------------------------------------------------------------


def test_reference_by_hand() -> None:
    """Sums written out, padding included."""
    x, weight = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(6, 3, 3, 3, dtype=torch.float64)
    scale, shift = torch.randn(2, 6, dtype=torch.float64)
    found = reference.conv_norm(x, weight, scale, shift)
    assert found.shape == (2, 6, 3, 2)
    for b, o, h, w in ((0, 0, 0, 0), (1, 5, 2, 1), (0, 3, 1, 1)):
        total = 0.0
        for c, dy, dx in ((c, dy, dx) for c in range(3) for dy in range(3) for dx in range(3)):
            i, j = 2 * h + dy - 1, 2 * w + dx - 1
            if 0 <= i < 5 and 0 <= j < 4:
                total += (x[b, c, i, j] * weight[o, c, dy, dx]).item()
        assert found[b, o, h, w].item() == pytest.approx(total * scale[o].item() + shift[o].item(), abs=1e-12)
    assert torch.equal(reference.conv_norm(x, weight, scale, shift, activation="relu"), found.clamp(min=0))


def test_pixels_are_normalised_images() -> None:
    """With mean and std folded into the weight, border and shift, where padding is 0 after the normalisation."""
    mean, std = torch.tensor([0.5, 0.25, 0.75]).double(), torch.tensor([0.25, 0.5, 0.125]).double()
    x, weight = pixels(2, 7, 9), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    one, zero = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    normalised = (x.double() / 255 - mean[:, None, None]) / std[:, None, None]
    expected = reference.conv_norm(normalised, weight, one, zero)
    border = 255 * mean - ops.PIXEL_OFFSET
    folded = weight / (255 * std)[:, None, None]
    shift = -(folded.sum((2, 3)) @ border)
    found = reference.conv_norm(x, folded, one, shift, border=border)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


X, PIXELS = torch.zeros(1, 4, 5, 5), torch.zeros(1, 3, 5, 5, dtype=torch.uint8)
W, S = torch.zeros(6, 4, 3, 3), torch.zeros(6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.conv_norm(X[0], W, S, S), ValueError, r"x: got shape \[4, 5, 5\], allowed is \[B, C, H, W\]"),
        (lambda: ops.conv_norm(X, W[:, :3], S, S), ValueError, r"weight: got shape \[6, 3, 3, 3\], allowed is \[outputs, 4, 3, 3\]"),
        (lambda: ops.conv_norm(X, W[..., :1], S, S), ValueError, "weight: got shape"),
        (lambda: ops.conv_norm(X, W.half(), S, S), TypeError, "weight: got torch.float16, allowed is x's torch.float32"),
        (lambda: ops.conv_norm(X, W.int(), S, S), TypeError, "weight: got torch.int32"),
        (lambda: ops.conv_norm(X.int(), W, S, S), TypeError, "x: got torch.int32, allowed is a floating dtype"),
        (lambda: ops.conv_norm(X, W, S[:5], S), ValueError, r"scale: got shape \[5\], allowed is \[6\]"),
        (lambda: ops.conv_norm(X, W, S, S.half()), TypeError, "shift: got torch.float16"),
        (lambda: ops.conv_norm(X, W, S, S, activation="tanh"), ValueError, "activation: got 'tanh'"),
        (lambda: ops.conv_norm(X, W, S, S, border=S[:4]), ValueError, r"border: got shape \[4\] with x in torch.float32"),
        (lambda: ops.conv_norm(PIXELS, W[:, :3], S, S), ValueError, "border: got None with x in torch.uint8"),
        (lambda: ops.conv_norm(PIXELS, W[:, :3], S, S, border=S), ValueError, r"border: got shape \[6\], allowed is \[3\]"),
        (lambda: ops.conv_norm(X, W, S, S, backend="cuda"), ValueError, "backend"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    torch.set_default_device(None)
    with pytest.raises(error, match=message):
        call()


def test_a_gradient_of_the_border_is_seen() -> None:
    case = conv_norm_case(pixels(1, 5, 5), 6, None, torch.float32)
    border = case.options["border"].requires_grad_()
    ops.conv_norm(*case.arguments, border=border, backend="auto").sum().backward()
    assert border.grad is not None
    with pytest.raises(ops.UnsupportedError, match="a gradient is needed"):
        ops.conv_norm(*case.arguments, border=border, backend="triton")


def test_pixels_in_autocast() -> None:
    """The result has the weight's dtype."""
    case = conv_norm_case(pixels(1, 5, 6), 6, None, torch.float32)
    with torch.autocast(machine.DEVICE.type, torch.float16):
        eager, triton = case.run("eager"), case.run("triton")
    assert eager.dtype == triton.dtype == torch.float32
    assert 1e-5 < (triton - case.run("eager")).abs().max() < 2e-2


# --- kernel ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [3, 24, 40])
def test_layouts(channels: int, layout: str) -> None:
    """3 images of 15 x 7 pixels: 315 rows, whole tiles and a part."""
    case = conv_norm_case(draw_map((3, channels, 29, 14), torch.float16, layout), 24, "relu")
    check(case)
    assert case.run("triton").is_contiguous(memory_format=torch.channels_last)
    x, weight, *vectors = case.arguments
    contiguous = Case("conv_norm", (x, weight.contiguous(), *vectors), case.options)
    machine.same(contiguous.run("triton"), case.run("triton"))


@pytest.mark.parametrize("dtype", machine.DTYPES, ids=machine.id_of)
@pytest.mark.parametrize(
    ("inputs", "outputs", "side"),
    [(3, 24, 23), (3, 48, 23), (24, 48, 23), (48, 96, 23), (96, 192, 5), (96, 224, 23), (128, 320, 5)],
)
def test_widths_of_the_networks(inputs: int, outputs: int, side: int, dtype: torch.dtype) -> None:
    check(
        conv_norm_case(draw_map((1, inputs, side, side), dtype), outputs, "relu" if outputs <= 96 else None), ulps=0.0
    )


@pytest.mark.parametrize(("inputs", "outputs"), [(224, 448), (320, 512), (384, 768)])
def test_the_widest(inputs: int, outputs: int) -> None:
    check(conv_norm_case(draw_map((1, inputs, 4, 3), torch.float16), outputs), ulps=0.0)


@pytest.mark.usefixtures("many_rows")
@pytest.mark.parametrize(
    ("inputs", "outputs", "block_m", "widths"),
    [
        (24, 48, 128, (32, 16)),
        (20, 96, 128, (64, 32)),
        (40, 230, 128, (128,)),
        (96, 224, 64, (128, 64, 32)),
        (48, 448, 128, (128,)),
        (32, 320, 128, (128, 32)),
    ],
)
def test_tiles_of_many_rows(inputs: int, outputs: int, block_m: int, widths: tuple[int, ...]) -> None:
    """286 rows are some tiles and a part; columns one tile, several, and a part of one."""
    case = conv_norm_case(draw_map((2, inputs, 22, 25), torch.float16), outputs, "relu")
    with recorded() as launches:
        check(case)
    (launch,) = launches
    assert (launch.constants["BLOCK_M"], launch.constants["WIDTHS"]) == (block_m, widths)


@pytest.mark.parametrize("dtype", machine.DTYPES, ids=machine.id_of)
@pytest.mark.parametrize("channels", [1, 3, 17])
def test_pixels(channels: int, dtype: torch.dtype) -> None:
    x = pixels(2, 21, 26, channels)
    case = conv_norm_case(x, 40, "relu", dtype)
    check(case)
    plane = Case("conv_norm", (x.contiguous(), *case.arguments[1:]), case.options)
    machine.same(plane.run("triton"), case.run("triton"))


@pytest.mark.parametrize("channels", [3, 24])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_spoiled_element_reaches_its_taps_alone(value: float, channels: int) -> None:
    for place in range(25):
        x = draw_map((2, channels, 5, 5), torch.float16)
        x[1, channels - 1, place // 5, place % 5] = value
        check(conv_norm_case(x, 20))


@pytest.mark.parametrize("channels", [3, 24])
@pytest.mark.parametrize("far", ["images", "lines", "columns", "channels"])
def test_offsets_beyond_32_bits(far: str, channels: int) -> None:
    if far == "channels" and channels > conv_norm.GATHERED:
        pytest.skip("such a map is copied first")
    near = torch.randn(2, channels, 5, 5).half()
    # The first taps of the last outputs lie beyond 32 bits already, in the line or column before the last but one.
    size = {"images": 1, "lines": 3, "columns": 3, "channels": channels - 1}[far]
    strides = {"images": 25 * channels, "channels": 1, "lines": 5 * channels, "columns": channels}
    strides[far] = -(-FAR // size // 8) * 8
    order = [strides[name] for name in ("images", "channels", "lines", "columns")]
    x = far_storage(near.numel() + strides[far]).as_strided(near.shape, order)
    x.copy_(near)
    case = conv_norm_case(near, 20)
    machine.same(Case("conv_norm", (x, *case.arguments[1:]), case.options).run("triton"), case.run("triton"))


def test_a_doubled_activation_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """As bfloat16's is, which the interpreter has not."""
    monkeypatch.setattr(conv_norm, "form", lambda activation, dtype: "gelu_exp3_x2")
    check(conv_norm_case(draw_map((2, 24, 5, 5), torch.float16), 20, "gelu"))


def test_more_channels_of_pixels_than_images_have() -> None:
    """They are gathered, too, and want the tiles of what is gathered."""
    x = torch.randint(0, 256, (2, 17, 9, 9), dtype=torch.uint8)
    with recorded() as launches:
        check(conv_norm_case(x, 20, "relu", torch.float16))
    asked = {launch.constants["BLOCK_K"] for launch in launches}
    with recorded() as launches:
        check(conv_norm_case(draw_map((2, 15, 9, 9), torch.float16), 20, "relu"))
    assert asked == {launch.constants["BLOCK_K"] for launch in launches}


def test_nothing_to_do() -> None:
    for x in (torch.randn(0, 24, 5, 5).half(), torch.randn(0, 3, 5, 5).half()):
        assert conv_norm_case(x, 20).run("triton").shape == (0, 20, 3, 3)


def test_opcheck() -> None:
    for case in (
        conv_norm_case(torch.randn(2, 3, 9, 9).half(), 20, "relu"),
        conv_norm_case(pixels(2, 9, 9), 20, "relu", torch.float16),
        conv_norm_case(draw_map((2, 24, 1, 1), torch.float16), 20),
    ):
        options = case.options["activation"], case.options.get("border")
        torch.library.opcheck(conv_norm.conv_norm, (*case.arguments, *options))


def test_the_table_may_leave_it_to_the_vendor() -> None:
    entry = Entry(("conv_norm",), tuple(CLASSES), tuple(TABLE_DTYPES.values()), (), None)
    for case in (
        conv_norm_case(draw_map((2, 24, 9, 12), torch.float16, "contiguous"), 40, "hard_swish"),
        conv_norm_case(draw_map((2, 3, 9, 12), torch.float32), 40),
        conv_norm_case(pixels(2, 9, 12), 40, "relu", torch.float16),
    ):
        own = case.run("triton")
        with config.preferring(entry):
            found = case.run("triton")
            machine.check(case)
        assert found.stride() == own.stride()
        assert not torch.equal(found, own)  # which would say that it was the same


def test_chunks_of_the_depth() -> None:
    """Equal parts without padding where there are any, of no more than is asked for."""
    sizes = (24, 48, 96, 128, 224, 320, 20, 50, 200)
    found = {channels: conv_norm._depths(channels, 64, HOPPER) for channels in sizes}
    assert found == {
        24: (32,), 48: (32, 16), 96: (32, 16), 128: (64,), 224: (32,), 320: (64,), 20: (32,), 50: (64,), 200: (64,),
    }  # fmt: skip
    assert conv_norm._depths(224, 128, HOPPER) == (64, 32, 16)
    single = {channels: conv_norm._depths(channels, 64, BLACKWELL) for channels in sizes}
    assert single == {
        24: (32,), 48: (64,), 96: (32,), 128: (64,), 224: (32,), 320: (64,), 20: (32,), 50: (64,), 200: (32,),
    }  # fmt: skip
    assert conv_norm._depths(224, 16, BLACKWELL) == (16,)
