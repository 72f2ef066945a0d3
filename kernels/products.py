"""Matrix products inside the kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_product(b_acc, b_x, b_weight, PRECISION: tl.constexpr):
    """b_acc + b_x · b_weight. Exact float32 sums each step on its own: a running sum would lose more than PyTorch."""
    if PRECISION == "ieee" and b_weight.dtype == tl.float32:
        # A minus, since Triton merges a product and the `+` behind it into one running sum.
        b_sum = b_acc - tl.dot(-b_x, b_weight, input_precision=PRECISION)
    else:
        b_sum = tl.dot(b_x, b_weight, b_acc, input_precision=PRECISION)
    return b_sum
