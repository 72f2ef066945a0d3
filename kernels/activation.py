"""Activations inside the kernels, and the forms that GELU takes.

erf costs 32 instructions an element and would take longer than the matrix products around it. The other forms write
gelu(x) = relu(x) - t(|x|), t(a) = a * erfc(a / sqrt(2)) / 2, and fit t; `python -m effformer.bench.fit_gelu` derives
the coefficients. Largest absolute error, and instructions an element on an NVIDIA GPU:

    gelu_erf    float32   -                            32
    gelu_exp3   bfloat16  5.5e-5                        7
    gelu_poly7  float16   6.6e-4 (rounding included)    6, in pairs

relu(x) is (x + |x|) / 2 in both, so that -inf gives NaN, as x * Phi(x) does, and +inf and NaN stay.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

# NetsPresso's name -> the kernels'.
NAMES = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu", "hard_swish": "hard_swish"}

# Coefficients from the constant on.
EXP3 = tl.constexpr((-1.00353177, -1.12924583, -0.49882025, -0.024885541))
EXP3_CAP = tl.constexpr(4.75)
POLY7 = tl.constexpr(
    (0.100345736, -0.127594768, 0.0146514885, 0.0573227896, -0.0333557307, 0.00157841704, 0.00329587882, -0.000698313757)
)
POLY7_CENTRE = tl.constexpr(1.5)

_GELU = {torch.float32: "gelu_erf", torch.bfloat16: "gelu_exp3", torch.float16: "gelu_poly7"}


def form(activation: str, dtype: torch.dtype, *, assembly: bool) -> str:
    """How `activation` is computed where the hidden values are stored as `dtype`.

    `assembly` admits the forms in inline assembly; without it their pure twins are taken.
    """
    name = NAMES[activation]
    if name == "gelu":
        name = _GELU[dtype]
    return name + "_ptx" if name == "gelu_poly7" and assembly else name


@triton.constexpr_function
def gain(form):
    """What `activate` multiplies the activation by, for the step after it to divide by."""
    return 2.0 if form == "gelu_exp3" else 1.0


@triton.jit
def activate(x, FORM: tl.constexpr):
    """`gain(FORM)` times the activation of x (float32), in float32 or float16."""
    if FORM == "none":
        y = x
    elif FORM == "gelu_erf":
        y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif FORM == "gelu_exp3":
        y = gelu_exp3(x)
    elif FORM == "gelu_poly7":
        y = gelu_poly7(x.to(tl.float16))
    elif FORM == "gelu_poly7_ptx":
        y = gelu_poly7_ptx(x.to(tl.float16))
    elif FORM == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif FORM == "silu":
        y = x / (1.0 + tl.exp(-x))
    else:
        tl.static_assert(FORM == "hard_swish")
        bounded = tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0)
        y = x * (bounded * 0.16666666666666666)
    return y


@triton.jit
def gelu_exp3(x):
    """2 * gelu(x) in float32: the doubled relu is one addition, whose absolute value is free."""
    a = tl.minimum(tl.abs(x), EXP3_CAP)  # beyond, the tail is nothing; of infinity it would be NaN
    p = ((EXP3[3] * a + EXP3[2]) * a + EXP3[1]) * a + (EXP3[0] + 1)
    return (x + tl.abs(x)) - a * tl.math.exp2(p)


@triton.jit
def gelu_poly7(x):
    """gelu(x) in float16, rounded after each step: the twin of `gelu_poly7_ptx`."""
    a = tl.abs(x)
    v = a - POLY7_CENTRE
    q = tl.full(x.shape, POLY7[7], tl.float16)
    for i in tl.static_range(7):
        q = _fma(v, q, POLY7[6 - i])
    q = tl.minimum(tl.maximum(q, 0.0), 1.0)
    return _fma(a, tl.full(x.shape, 0.5, tl.float16), x * 0.5) - q


@triton.jit
def _fma(a, b, c):
    # a * b is exact in float32; constants are float16 first, as in the assembly
    return (a.to(tl.float32) * b.to(tl.float32) + tl.cast(c, tl.float16).to(tl.float32)).to(tl.float16)


def _pair(value: float) -> str:
    """A register that holds `value` twice in float16, as an assembly literal."""
    return "0x" + 2 * struct.pack(">e", value).hex()


_POLY7_PTX = tl.constexpr(
    "{ .reg .b32 a, v, q, r;"
    " abs.f16x2 a, $1;"
    f" mov.b32 v, {_pair(-POLY7_CENTRE.value)};"
    " add.rn.f16x2 v, a, v;"
    f" mov.b32 q, {_pair(POLY7.value[7])};"
    + "".join(f" mov.b32 r, {_pair(c)}; fma.rn.f16x2 q, v, q, r;" for c in POLY7.value[6:0:-1])
    + f" mov.b32 r, {_pair(POLY7.value[0])}; fma.rn.sat.f16x2 q, v, q, r;"
    f" mov.b32 r, {_pair(0.5)};"
    " mul.rn.f16x2 v, $1, r;"
    " fma.rn.f16x2 v, a, r, v;"
    " sub.rn.f16x2 $0, v, q; }"
)


@triton.jit
def gelu_poly7_ptx(x):
    """gelu(x) in float16, two elements at a time."""
    return tl.inline_asm_elementwise(_POLY7_PTX, "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2)
