"""The accuracy rule: how far a result may be from float64, measured by how far eager PyTorch is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Accuracy:
    """Errors of a result in dtype T against float64, beside those of eager PyTorch in T.

    The rule: the largest error is at most twice eager's, the mean error at most 1.5 times eager's, both plus 2 ulp of
    T at the output's scale, the largest absolute value; NaN and infinities stand exactly where float64 has them.
    """

    max_error: float
    mean_error: float
    eager_max_error: float
    eager_mean_error: float
    ulp: float
    misplaced: int  # elements that are NaN or infinite where float64 is not, or the other way round

    def passes(self, ulps: float = 2.0) -> bool:
        """Whether the rule holds, with `ulps` in place of its 2."""
        slack = ulps * self.ulp
        largest = self.max_error <= 2 * self.eager_max_error + slack
        return self.misplaced == 0 and largest and self.mean_error <= 1.5 * self.eager_mean_error + slack

    def __str__(self) -> str:
        return (
            f"max {self.max_error:.2e} (eager {self.eager_max_error:.2e}), mean {self.mean_error:.2e} "
            f"(eager {self.eager_mean_error:.2e}), ulp {self.ulp:.1e}, {self.misplaced} misplaced NaN or infinities"
        )


@dataclass(frozen=True)
class ParameterAccuracy(Accuracy):
    """Errors of a parameter's gradient, which is a sum over all rows: each may be three times eager's, plus 2 ulp."""

    def passes(self, ulps: float = 2.0) -> bool:
        slack = ulps * self.ulp
        largest = self.max_error <= 3 * self.eager_max_error + slack
        return self.misplaced == 0 and largest and self.mean_error <= 3 * self.eager_mean_error + slack


def accuracy(result: Tensor, exact: Tensor, eager: Tensor) -> Accuracy:
    """Compare `result` and `eager`, both in dtype T, with `exact` in float64.

    Raises:
        ValueError: if `result` is not of eager's shape and dtype.
    """
    if result.shape != eager.shape or result.dtype != eager.dtype:
        raise ValueError(
            f"result: got {tuple(result.shape)} {result.dtype}, allowed is {tuple(eager.shape)} {eager.dtype}"
        )
    result, eager, dtype = result.double(), eager.double(), result.dtype
    finite = exact.isfinite()
    same = torch.where(finite, result.isfinite(), (result == exact) | (result.isnan() & exact.isnan()))
    errors = (result - exact).abs()[finite & result.isfinite()]
    eager_errors = (eager - exact).abs()[finite & eager.isfinite()]
    scale = exact[finite].abs().max().item() if finite.any() else 0.0
    info = torch.finfo(dtype)
    ulp = info.eps * 2.0 ** math.floor(math.log2(max(scale, info.tiny)))
    return Accuracy(
        _max(errors), _mean(errors), _max(eager_errors), _mean(eager_errors), ulp, int((~same).sum().item())
    )


def _max(errors: Tensor) -> float:
    return errors.max().item() if errors.numel() else 0.0


def _mean(errors: Tensor) -> float:
    return errors.mean().item() if errors.numel() else 0.0
