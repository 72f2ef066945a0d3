"""Activations inside the kernels, and the forms that GELU takes.

erf costs 32 instructions an element and would take longer than the matrix products around it. The other form writes
gelu(x) = relu(x) - b * 2**p(b), b = min(|x|, cap), with p of degree 3, as `python -m effformer.bench.offline.fit_gelu`
derives it. Its error is 1.2e-4 at most, and 1.2e-4 of |x| where |x| < 1: an eighth of an ulp of float16.

    gelu_erf      float32   exact                                   32 instructions an element on an NVIDIA GPU
    gelu_exp3     float16   1.2e-4                                   8
    gelu_exp3_x2  bfloat16  1.2e-4, doubled (see `gain`)             7

relu(x) is (x + |x|) / 2, so that -inf gives NaN, as x * Phi(x) does, while inf and NaN stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

# NetsPresso's name -> that of the kernels.
NAMES = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu", "hard_swish": "hard_swish"}

# The same by PyTorch, beside the vendor's library.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "hard_swish": F.hardswish,
}

# Coefficients of p from the constant on.
EXP3 = tl.constexpr((-1.00033479, -1.143408, -0.483782587, -0.0292018158))
EXP3_CAP = tl.constexpr(5.0)

_GELU = {torch.float32: "gelu_erf", torch.float16: "gelu_exp3", torch.bfloat16: "gelu_exp3_x2"}


def form(activation: str, dtype: torch.dtype) -> str:
    """How `activation` is computed where the hidden values are stored as `dtype`."""
    name = NAMES[activation]
    return _GELU[dtype] if name == "gelu" else name


@triton.constexpr_function
def gain(form):
    """The factor that `activate` multiplies the activation by; the next step divides by it.

    The double saves an instruction. It is infinite above 1.7e38, half of bfloat16's range; float16 has no such room.
    """
    return 2.0 if form == "gelu_exp3_x2" else 1.0


@triton.jit
def activate(x, FORM: tl.constexpr):
    """`gain(FORM)` times the activation of x, in float32."""
    if FORM == "none":
        y = x
    elif FORM == "gelu_erf":
        y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif FORM == "gelu_exp3":
        y = 0.5 * (x + tl.abs(x)) - gelu_tail(x, 0.0)
    elif FORM == "gelu_exp3_x2":
        y = (x + tl.abs(x)) - gelu_tail(x, 1.0)
    elif FORM == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif FORM == "silu":
        y = x / (1.0 + tl.exp(-x))
    else:
        tl.static_assert(FORM == "hard_swish")
        y = x * (tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) * 0.16666666666666666)
    return y


@triton.jit
def gelu_tail(x, DOUBLINGS: tl.constexpr):
    """2**DOUBLINGS * (relu(x) - gelu(x)): falls to nothing on both sides."""
    b = tl.minimum(tl.abs(x), EXP3_CAP)  # beyond it the term is 0; for infinity it would be NaN
    p = ((EXP3[3] * b + EXP3[2]) * b + EXP3[1]) * b + (EXP3[0] + DOUBLINGS)
    return b * tl.math.exp2(p)
