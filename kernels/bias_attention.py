"""Attention with a learned bias: softmax(q · kᵀ * key_dim**-0.5 + bias) · v; paper section 4, MB3D.

One program takes a tile of queries of one head. The scores start from the bias, divided by the scale, as accumulator
of q · kᵀ: they stay in the layout of matrix products, and one multiplication scales both, on the way to the exponent.
In float32 the bias comes last: a large one would round each partial sum.
A bias that stays the same over many calls can be divided, and laid out in tiles, once: `prepare_bias`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, dot_precision, float32_products, kernel, run
from .layout import new_tokens
from .register import register
from .rows import channel_mask, channels_of, split, width
from .tiling.choose import Question, attention_config
from .tiling.device import device_of

# The most values of a head that one program computes; several programs share more.
MOST_VALUES = 256
# Offsets up to here are counted in 32 bits: half of their range, since tiles reach beyond the last token.
MOST_OFFSET = 2**30
# Channels of a sum in float32.
_SHORT = 64
# Bound of a finite bias divided by the scale: float32 has room for a product beside it.
MOST_SCORE = tl.constexpr(1e38)


@kernel
def bias_attention_kernel(
    qkv_ptr,
    bias_ptr,
    out_ptr,
    N,
    stride_qb,
    stride_qn,
    stride_qc,
    stride_bh,
    stride_bm,
    stride_bn,
    HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_WIDTHS: tl.constexpr,
    VALUE_WIDTHS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SCALE: tl.constexpr,
    DENSE: tl.constexpr,
    PREPARED: tl.constexpr,
    ONE_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    i_v = tl.program_id(0) % tl.cdiv(VALUE_DIM, BLOCK_V)
    i_mh = tl.program_id(0) // tl.cdiv(VALUE_DIM, BLOCK_V)
    i_m = i_mh % tl.cdiv(N, BLOCK_M)
    i_bh = i_mh // tl.cdiv(N, BLOCK_M)
    i_h = i_bh % HEADS
    i_b = (i_bh // HEADS).to(tl.int64)

    if DENSE:  # constants become part of the instructions
        stride_qn = HEADS * (2 * KEY_DIM + VALUE_DIM)
        stride_qc = 1
    r = tl.arange(0, BLOCK_M)
    first_row = (i_m * BLOCK_M).to(tl.int64)
    inside = i_m * BLOCK_M + r < N
    p_head = qkv_ptr + i_b * stride_qb + (i_h * (2 * KEY_DIM + VALUE_DIM)).to(tl.int64) * stride_qc
    p_values = p_head + (2 * KEY_DIM + i_v * BLOCK_V).to(tl.int64) * stride_qc
    p_queries = p_head + first_row * stride_qn
    p_bias = bias_ptr + i_h.to(tl.int64) * stride_bh + first_row * stride_bm
    # A prepared bias is read without a mask: rows beyond the last read the last one.
    r_bias = tl.minimum(r, N - 1 - i_m * BLOCK_M) if PREPARED else r
    p_bias += _times(r_bias, stride_bm, DENSE)[:, None]

    b_q = ()
    for i in tl.static_range(len(KEY_WIDTHS)):
        c = channels_of(KEY_WIDTHS, i)
        p_q = p_queries + _times(r, stride_qn, DENSE)[:, None] + _times(c, stride_qc, DENSE)[None, :]
        b_q = b_q + (tl.load(p_q, mask=inside[:, None] & channel_mask(c, KEY_DIM, KEY_WIDTHS, i), other=0.0),)

    TO_BITS: tl.constexpr = SCALE * 1.4426950408889634  # exp(x) = 2 ** (x * log2(e))
    if ONE_TILE:
        n = tl.arange(0, BLOCK_N)
        b_s = _scores(
            b_q, p_head, p_bias, inside, n, N, stride_qn, stride_qc, stride_bn,
            KEY_DIM, KEY_WIDTHS, SCALE, DENSE, PREPARED, PRECISION,
        )  # fmt: skip
        # Subtract first: a fused b_s * TO_BITS - maximum would keep the rounding error of the maximum, of any size.
        b_p = tl.math.exp2((b_s - tl.max(b_s, 1)[:, None]) * TO_BITS)
        b_sum = tl.sum(b_p, 1)
        b_acc = ()
        for i in tl.static_range(len(VALUE_WIDTHS)):
            b_v = _values(p_values, n, N, stride_qn, stride_qc, i_v, VALUE_DIM, VALUE_WIDTHS, i, BLOCK_V, DENSE)
            b_acc = b_acc + (tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION),)
    else:
        b_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        b_sum = tl.zeros((BLOCK_M,), tl.float32)
        b_acc = ()
        for i in tl.static_range(len(VALUE_WIDTHS)):
            b_acc = b_acc + (tl.zeros((BLOCK_M, width(VALUE_WIDTHS, i)), tl.float32),)
        for first in tl.range(0, N, BLOCK_N, num_stages=NUM_STAGES):
            n = first + tl.arange(0, BLOCK_N)
            b_s = _scores(
                b_q, p_head, p_bias, inside, n, N, stride_qn, stride_qc, stride_bn,
                KEY_DIM, KEY_WIDTHS, SCALE, DENSE, PREPARED, PRECISION,
            )  # fmt: skip
            b_new = tl.maximum(b_max, tl.max(b_s, 1))
            # A row of -inf alone has not met a maximum to subtract yet.
            shift = tl.where(b_new == -float("inf"), 0.0, b_new)
            b_p = tl.math.exp2((b_s - shift[:, None]) * TO_BITS)
            fade = tl.math.exp2((b_max - shift) * TO_BITS)
            b_sum = b_sum * fade + tl.sum(b_p, 1)
            b_max = b_new
            b_next = ()
            for i in tl.static_range(len(VALUE_WIDTHS)):
                b_v = _values(p_values, n, N, stride_qn, stride_qc, i_v, VALUE_DIM, VALUE_WIDTHS, i, BLOCK_V, DENSE)
                faded = b_acc[i] * fade[:, None]
                b_next = b_next + (tl.dot(b_p.to(b_v.dtype), b_v, faded, input_precision=PRECISION),)
            b_acc = b_next

    reciprocal = (1.0 / b_sum)[:, None]
    p_out = out_ptr + (i_b * N + first_row) * (HEADS * VALUE_DIM) + i_h * VALUE_DIM + i_v * BLOCK_V
    for i in tl.static_range(len(VALUE_WIDTHS)):
        c = channels_of(VALUE_WIDTHS, i)
        mask = inside[:, None] & _value_mask(c, i_v, VALUE_DIM, VALUE_WIDTHS, i, BLOCK_V)
        p_piece = p_out + (r * (HEADS * VALUE_DIM))[:, None] + c[None, :]
        tl.store(p_piece, (b_acc[i] * reciprocal).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _times(i, stride, SHORT: tl.constexpr):
    """Offsets i * stride; in 32 bits where they fit."""
    if SHORT:
        offsets = i * stride
    else:
        offsets = i.to(tl.int64) * stride
    return offsets


@triton.jit
def _scores(
    b_q, p_head, p_bias, inside, n, N, stride_qn, stride_qc, stride_bn,
    KEY_DIM: tl.constexpr, KEY_WIDTHS: tl.constexpr, SCALE: tl.constexpr, DENSE: tl.constexpr, PREPARED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """q · kᵀ + bias / SCALE, [BLOCK_M, BLOCK_N], -inf for keys that do not exist."""
    there = (n < N)[None, :]
    p_bias += _times(n, stride_bn, DENSE)[None, :]
    if PREPARED:
        b_bias = tl.load(p_bias)
    else:
        b_bias = tl.load(p_bias, mask=inside[:, None] & there, other=-float("inf"))
        # A finite mask such as float32's lowest stays finite: only -inf takes a key away for good.
        LIMIT: tl.constexpr = MOST_SCORE * SCALE
        b_finite = tl.minimum(tl.maximum(b_bias, -LIMIT), LIMIT)
        b_bias = tl.where(tl.abs(b_bias) < float("inf"), b_finite, b_bias) * (1.0 / SCALE)
    BIAS_FIRST: tl.constexpr = b_q[0].dtype != tl.float32
    b_s = b_bias if BIAS_FIRST else tl.zeros(b_bias.shape, tl.float32)
    for i in tl.static_range(len(KEY_WIDTHS)):
        c = channels_of(KEY_WIDTHS, i)
        p_k = p_head + _times(n, stride_qn, DENSE)[None, :] + _times(KEY_DIM + c, stride_qc, DENSE)[:, None]
        b_k = tl.load(p_k, mask=there & channel_mask(c, KEY_DIM, KEY_WIDTHS, i).T, other=0.0)
        if BIAS_FIRST:
            b_s = tl.dot(b_q[i], b_k, b_s, input_precision=PRECISION)
        else:
            b_s += tl.dot(b_q[i], b_k, input_precision=PRECISION)
    return b_s if BIAS_FIRST else b_s + b_bias


@triton.jit
def _values(
    p_values, n, N, stride_qn, stride_qc, i_v, VALUE_DIM: tl.constexpr, VALUE_WIDTHS: tl.constexpr, PIECE: tl.constexpr,
    BLOCK_V: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, width], zeros for what does not exist."""
    c = channels_of(VALUE_WIDTHS, PIECE)
    mask = (n < N)[:, None] & _value_mask(c, i_v, VALUE_DIM, VALUE_WIDTHS, PIECE, BLOCK_V)
    p_v = p_values + _times(n, stride_qn, DENSE)[:, None] + _times(c, stride_qc, DENSE)[None, :]
    return tl.load(p_v, mask=mask, other=0.0)


@triton.jit
def _value_mask(
    c, i_v, VALUE_DIM: tl.constexpr, VALUE_WIDTHS: tl.constexpr, PIECE: tl.constexpr, BLOCK_V: tl.constexpr
):
    """[1, width]: which of the values c of one piece exist; a constant where all do."""
    if VALUE_DIM % BLOCK_V == 0:
        mask = channel_mask(c, BLOCK_V, VALUE_WIDTHS, PIECE)
    else:
        mask = ((c < BLOCK_V) & (i_v * BLOCK_V + c < VALUE_DIM))[None, :]
    return mask


def prepare_bias(bias: Tensor, key_dim: int, value_dim: int, dtype: torch.dtype) -> Tensor:
    """Convert bias [heads, N, N] to the form that the kernel adds to q · kᵀ, once for many calls.

    Divided by the scale, and padded to whole tiles of keys, those of attention in `dtype` with `value_dim` values a
    head; -inf for keys that do not exist. float32 [heads, N, K].
    """
    tokens = bias.shape[1]
    keys = padded_tokens(tokens, key_dim, value_dim, dtype, bias.device)
    limit = MOST_SCORE.value * key_dim**-0.5
    finite = torch.where(bias.isinf(), bias, bias.clamp(-limit, limit)) / key_dim**-0.5
    return F.pad(finite, (0, keys - tokens), value=-torch.inf)


def padded_tokens(tokens: int, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """Keys of whole tiles, which a prepared bias has."""
    config = attention_config(_question(tokens, key_dim, value_dim, dtype), device_of(device))
    return -(-tokens // config.block_n) * config.block_n


def _question(tokens: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> Question:
    return Question("bias_attention", dtype, (tokens, max(key_dim, min(value_dim, MOST_VALUES))))


def _key_widths(key_dim: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Pieces of the channels of queries and keys. In float32 they are short: each has a sum of its own."""
    if dtype != torch.float32 or key_dim > 8 * _SHORT:
        return split(key_dim, pieces=8)
    rest = key_dim % _SHORT
    return (_SHORT,) * (key_dim // _SHORT) + (split(rest) if rest else ())


def bias_attention_launch(
    qkv: Tensor, bias: Tensor, num_heads: int, key_dim: int, out: Tensor, *, prepared: bool = False
) -> Launch:
    """qkv [B, N, heads * (2 * key_dim + value_dim)] and bias [heads, N, N] of any strides; out contiguous.

    `prepared`: the bias is what `prepare_bias` returned.
    """
    batch, tokens, channels = qkv.shape
    value_dim = channels // num_heads - 2 * key_dim
    block_v = min(value_dim, MOST_VALUES)
    question = _question(tokens, key_dim, value_dim, qkv.dtype)
    device = device_of(qkv.device)
    config = attention_config(question, device)
    if prepared:
        shape = num_heads, tokens, padded_tokens(tokens, key_dim, value_dim, qkv.dtype, qkv.device)
        if bias.shape != shape or not bias.is_contiguous():
            raise ValueError(
                f"bias: got a prepared one of shape {list(bias.shape)} and strides {bias.stride()}, "
                f"allowed is {list(shape)}, contiguous: prepare it for {tokens} tokens in {qkv.dtype} again"
            )
    return Launch(
        bias_attention_kernel,
        batch * num_heads * -(-tokens // config.block_m) * -(-value_dim // block_v),
        {
            "qkv_ptr": qkv,
            "bias_ptr": bias,
            "out_ptr": out,
            "N": tokens,
            "stride_qb": qkv.stride(0),
            "stride_qn": qkv.stride(1),
            "stride_qc": qkv.stride(2),
            "stride_bh": bias.stride(0),
            "stride_bm": bias.stride(1),
            "stride_bn": bias.stride(2),
        },
        {
            "HEADS": num_heads,
            "KEY_DIM": key_dim,
            "VALUE_DIM": value_dim,
            "KEY_WIDTHS": _key_widths(key_dim, qkv.dtype),
            "VALUE_WIDTHS": split(block_v),
            "BLOCK_V": block_v,
            "SCALE": key_dim**-0.5,
            "DENSE": qkv.is_contiguous() and max(tokens * channels, tokens * sum(bias.stride()[1:])) < MOST_OFFSET,
            "PREPARED": prepared,
            "ONE_TILE": tokens <= config.block_n,
            "PRECISION": dot_precision(qkv.dtype, convolution=False, exact=float32_products(device)),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "NUM_STAGES": config.num_stages,
        },
        question,
        config.num_warps,
        config.num_stages,
    )


def new_values(qkv: Tensor, num_heads: int, key_dim: int) -> Tensor:
    """An empty [B, N, heads * value_dim]."""
    return new_tokens(qkv, qkv.shape[2] - 2 * num_heads * key_dim)


def _implementation(qkv: Tensor, bias: Tensor, num_heads: int, key_dim: int) -> Tensor:
    out = new_values(qkv, num_heads, key_dim)
    run(bias_attention_launch(qkv, bias, num_heads, key_dim, out))
    return out


bias_attention = register(
    "bias_attention(Tensor qkv, Tensor bias, int num_heads, int key_dim) -> Tensor",
    _implementation,
    lambda qkv, bias, num_heads, key_dim: new_values(qkv, num_heads, key_dim),
)
