"""Derivatives of the activations inside the kernels."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .activation import EXP3, EXP3_CAP

# Coefficients of a cubic s, from the constant on: gelu'(x) is 1 - e for x > 0 and else e, with e = 2**p(b) * s(b).
EXP3_SLOPE = tl.constexpr((0.999693736, -0.78789031, -0.67909407, -0.0574174532))
ROOT_HALF, ROOT_TAU = tl.constexpr(0.5**0.5), tl.constexpr((2 * math.pi) ** 0.5)


@triton.jit
def slope(x, FORM: tl.constexpr):
    """The derivative of the activation of x, in float32, for the forms without a `gain`.

    Beside `activate` one exponential serves both. The derivative of GELU is off by 2.7e-4 at most, but in float32.
    """
    if FORM == "gelu_erf":
        y = 0.5 * (1.0 + tl.math.erf(x * ROOT_HALF)) + x * (tl.exp(-0.5 * x * x) / ROOT_TAU)
    elif FORM == "gelu_exp3":
        b = tl.minimum(tl.abs(x), EXP3_CAP)
        power = tl.math.exp2(((EXP3[3] * b + EXP3[2]) * b + EXP3[1]) * b + (EXP3[0] + 0.0))  # as `gelu_tail` has it
        tail = power * (((EXP3_SLOPE[3] * b + EXP3_SLOPE[2]) * b + EXP3_SLOPE[1]) * b + EXP3_SLOPE[0])
        y = tl.where(x > 0, 1.0 - tail, tail) + 0.0 * x  # NaN for NaN and infinities, as for x * phi(x)
    elif FORM == "relu":
        y = tl.where(x <= 0, 0.0, 1.0)
    elif FORM == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        y = sigmoid * (1.0 + x * (1.0 - sigmoid))
    else:
        tl.static_assert(FORM == "hard_swish")
        y = tl.where(x < -3.0, 0.0, tl.where(x < 3.0, x * (1 / 3) + 0.5, 1.0))
    return y
