"""3x3 convolution of stride 2 with its BatchNorm and activation: act(scale * conv(x) + shift); stem and downsampling.

An implicit matrix product: rows are output pixels, the depth is the channels of nine taps. Where channels lie next to
each other, a step of the loop takes channels of one tap, which as a whole are within the map or not. Images, whose few
channels lie anyhow, are gathered element by element; pixels (uint8) are centred and bordered on the way.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .activation import FUNCTIONS, activate, form, gain
from .launch import Launch, dot_precision, float32_products, kernel, run
from .layout import dense_map, map_rows
from .register import register
from .rows import channels_of, cut, locate, split, start, width
from .tiling.choose import Question, conv_config
from .tiling.device import Device, device_of

GATHERED = 15  # the most channels of a map that is read in its own layout
PIXEL_OFFSET = 120  # taken from uint8, see `effformer.ops.conv_norm`


@kernel
def conv_norm_kernel(
    x_ptr,
    border_ptr,
    weight_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    rows,
    H,
    W,
    OUT_H,
    OUT_W,
    units_xb,
    units_xh,
    units_xw,
    units_xc,
    C: tl.constexpr,
    OUTPUTS: tl.constexpr,
    UNIT: tl.constexpr,
    GATHER: tl.constexpr,
    OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPTHS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # The column tiles of one row tile run side by side: its rows come from memory once, then from L2.
    i_n = tl.program_id(0) % tl.cdiv(OUTPUTS, BLOCK_N)
    i_m = tl.program_id(0) // tl.cdiv(OUTPUTS, BLOCK_N)
    row, b, h, w, inside = locate(i_m, rows, OUT_H, OUT_W, BLOCK_M)
    y, x = 2 * h - 1, 2 * w - 1  # of the first tap
    # Strides count UNIT elements: a known divisor tells the compiler how wide it may load.
    p_x = x_ptr + ((b.to(tl.int64) * units_xb + y.to(tl.int64) * units_xh + x.to(tl.int64) * units_xw) * UNIT)[:, None]

    b_acc = ()
    for i in tl.static_range(len(WIDTHS)):
        b_acc = b_acc + (tl.zeros((BLOCK_M, width(WIDTHS, i)), tl.float32),)
    if GATHER:
        for first in tl.range(0, 9 * C, BLOCK_K, num_stages=NUM_STAGES):
            k = first + tl.arange(0, BLOCK_K)
            there = k < 9 * C
            dy, dx, c = k // C // 3, k // C % 3, k % C
            o_k = (dy.to(tl.int64) * units_xh + dx.to(tl.int64) * units_xw + c.to(tl.int64) * units_xc) * UNIT
            mask = _within(y[:, None] + dy[None, :], H) & _within(x[:, None] + dx[None, :], W) & there[None, :]
            b_x = tl.load(p_x + o_k[None, :], mask=mask, other=0)
            if OFFSET:
                border = tl.load(border_ptr + c, mask=there, other=0.0)
                b_x = tl.where(mask, b_x.to(tl.float32) - OFFSET, border[None, :])
            b_acc = _multiplied(b_x, weight_ptr, k, there, i_n, b_acc, C, OUTPUTS, PRECISION, WIDTHS, BLOCK_N)
    else:
        for step in tl.range(0, 9 * tl.cdiv(C, BLOCK_K), num_stages=NUM_STAGES):
            tap = step // tl.cdiv(C, BLOCK_K)
            first = step % tl.cdiv(C, BLOCK_K) * BLOCK_K
            # In 64 bits; in the interpreter the number is a Python int.
            dy, dx = tl.full((), 0, tl.int64) + tap // 3, tl.full((), 0, tl.int64) + tap % 3
            mask = (_within(y + tap // 3, H) & _within(x + tap % 3, W))[:, None]
            p_tap = p_x + ((dy * units_xh + dx * units_xw) * UNIT + first)
            for i in tl.static_range(len(DEPTHS)):
                c = channels_of(DEPTHS, i)
                there = first + c < C
                if C % BLOCK_K == 0 or (C < BLOCK_K and not cut(DEPTHS, i, C)):
                    b_x = tl.load(p_tap + c[None, :], mask=mask, other=0.0)
                else:
                    b_x = tl.load(p_tap + c[None, :], mask=mask & there[None, :], other=0.0)
                k = tap * C + first + c
                b_acc = _multiplied(b_x, weight_ptr, k, there, i_n, b_acc, C, OUTPUTS, PRECISION, WIDTHS, BLOCK_N)

    o_out = row.to(tl.int64) * OUTPUTS
    for i in tl.static_range(len(WIDTHS)):
        n = i_n * BLOCK_N + start(WIDTHS, i) + tl.arange(0, width(WIDTHS, i))
        there = n < OUTPUTS
        scale = tl.load(scale_ptr + n, mask=there, other=0.0)[None, :]
        shift = tl.load(shift_ptr + n, mask=there, other=0.0)[None, :]
        value = activate(b_acc[i] * scale + shift, ACTIVATION) * (1.0 / gain(ACTIVATION))
        mask = inside[:, None]
        if OUTPUTS % BLOCK_N != 0:
            mask = mask & there[None, :]
        tl.store(out_ptr + o_out[:, None] + n[None, :], value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _within(i, SIZE):
    return (i >= 0) & (i < SIZE)


@triton.jit
def _multiplied(
    b_x, weight_ptr, k, there, i_n, b_acc,
    C: tl.constexpr, OUTPUTS: tl.constexpr, PRECISION: tl.constexpr, WIDTHS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """b_acc + b_x · weight, for the places k of the weight's 9 * C, of which some may not exist."""
    b_next = ()
    for i in tl.static_range(len(WIDTHS)):
        n = i_n * BLOCK_N + start(WIDTHS, i) + tl.arange(0, width(WIDTHS, i))
        p_weight = weight_ptr + n[None, :] * (9 * C) + k[:, None]
        b_weight = tl.load(p_weight, mask=(n < OUTPUTS)[None, :] & there[:, None], other=0.0)
        b_next = b_next + (tl.dot(b_x.to(b_weight.dtype), b_weight, b_acc[i], input_precision=PRECISION),)
    return b_next


def conv_norm_launches(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: str | None,
    border: Tensor | None,
    *,
    out: Tensor,
) -> list[Launch]:
    """One launch; none where the table leaves it to the vendor's library.

    x [B, C, H, W] of any strides, but with channels next to each other (`dense_map`) if they are more than GATHERED.
    weight [O, C, 3, 3] channels_last, scale and shift [O] float32; border [C] float32 with uint8, else None (the kernel
    rounds it to the weight's dtype); out [B, O, ceil(H / 2), ceil(W / 2)] channels_last, in the weight's dtype.
    """
    source, target, device = map_rows(x), map_rows(out), device_of(x.device)
    channels, outputs = source.channels, target.channels
    inputs = channels if border is None else min(channels, GATHERED)  # pixels are gathered, however many
    question = Question("conv_norm", weight.dtype, (outputs, inputs, target.count))
    config = conv_config(question, device)
    if config is None:
        return []
    gather = channels <= GATHERED or border is not None
    strides = source.stride_b, source.stride_h, source.stride_w, x.stride(1) if gather else 0
    unit = math.gcd(8, *strides)
    units = dict(zip(("units_xb", "units_xh", "units_xw", "units_xc"), (s // unit for s in strides), strict=True))
    depths = (_depth(9 * channels, config.block_k),) if gather else _depths(channels, config.block_k, device)
    block_n = sum(config.widths)
    launch = Launch(
        conv_norm_kernel,
        -(-target.count // config.block_m) * -(-outputs // block_n),
        {
            "x_ptr": x,
            "border_ptr": border,
            "weight_ptr": weight,
            "scale_ptr": scale,
            "shift_ptr": shift,
            "out_ptr": out,
            "rows": target.count,
            "H": source.height,
            "W": source.width,
            "OUT_H": target.height,
            "OUT_W": target.width,
            **units,
        },
        {
            "C": channels,
            "OUTPUTS": outputs,
            "UNIT": unit,
            "GATHER": gather,
            "OFFSET": PIXEL_OFFSET if border is not None else 0,
            "ACTIVATION": form(activation, weight.dtype) if activation else "none",
            "PRECISION": dot_precision(weight.dtype, convolution=True, exact=float32_products(device)),
            "BLOCK_M": config.block_m,
            "WIDTHS": config.widths,
            "BLOCK_N": block_n,
            "DEPTHS": depths,
            "BLOCK_K": sum(depths),
            "NUM_STAGES": config.num_stages,
        },
        question,
        config.num_warps,
        config.num_stages,
    )
    return [launch]


def _depth(size: int, most: int) -> int:
    """The power of two, 16 and more, that holds `size`, or `most`."""
    return min(max(16, triton.next_power_of_2(size)), most)


def _depths(channels: int, most: int, device: Device) -> tuple[int, ...]:
    """Powers of two that make up the channels of a step: equal parts of all, if there are any, of `most` at most.

    Where products must not be chained it is a single one, the largest of those that are padded least.
    """
    if not device.chains_products:
        depths = [depth for depth in (16, 32, 64, 128, 256) if min(32, most) <= depth <= most]
        return (min(reversed(depths), key=lambda depth: -(-channels // depth) * depth),)
    for parts in range(-(-channels // most), channels // 16 + 1):
        if channels % parts == 0 and sum(split(channels // parts)) == channels // parts:
            return split(channels // parts)
    return (_depth(channels, most),)


def _by_vendor(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, activation: str | None, border: Tensor | None
) -> Tensor:
    """By cuDNN, the scale folded into the weight."""
    padding = 1
    if border is not None:
        pixels = x.to(weight.dtype) - PIXEL_OFFSET
        x = border.to(weight.dtype)[:, None, None].expand(*x.shape[:2], x.shape[2] + 2, x.shape[3] + 2).contiguous()
        x[:, :, 1:-1, 1:-1] = pixels
        padding = 0
    folded = (weight * scale[:, None, None, None]).to(weight.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(x, folded, shift.to(weight.dtype), stride=2, padding=padding)
    return FUNCTIONS[activation](y) if activation else y


def new_halved(x: Tensor, weight: Tensor) -> Tensor:
    """An empty [B, O, ceil(H / 2), ceil(W / 2)], channels_last, in the weight's dtype."""
    shape = x.shape[0], (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2, weight.shape[0]
    return torch.empty(shape, dtype=weight.dtype, device=x.device).permute(0, 3, 1, 2)


def _implementation(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, activation: str | None, border: Tensor | None
) -> Tensor:
    out = new_halved(x, weight)
    weight = weight.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    scale, shift = scale.contiguous(), shift.contiguous()
    border = None if border is None else border.contiguous()
    if x.shape[1] > GATHERED and border is None:
        x = dense_map(x)
    if launches := conv_norm_launches(x, weight, scale, shift, activation, border, out=out):
        run(*launches)
        return out
    y = _by_vendor(x, weight, scale, shift, activation, border)
    return y if y.stride() == out.stride() else out.copy_(y)


conv_norm = register(
    "conv_norm(Tensor x, Tensor weight, Tensor scale, Tensor shift, str? activation, Tensor? border) -> Tensor",
    _implementation,
    new_halved,
)
