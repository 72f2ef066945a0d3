"""Derivation of the GELU approximations in `kernels/activation.py`: python -m effformer.bench.fit_gelu

Both forms write gelu(x) = relu(x) - t(|x|) with the tail t(a) = a * Q(a), Q(a) = erfc(a / sqrt(2)) / 2, and fit t for
the smallest largest absolute error (a linear programme; needs scipy, extra `bench`).

exp3:  t(a) = min(a, cap) * 2**p(min(a, cap)), p of degree 3, evaluated in float32
poly7: t(a) = max(0, q(a - centre)), q of degree 7, evaluated in float16
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.special import erfc

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """Coefficients from the constant on, the largest absolute error in exact arithmetic, and the form's parameter."""

    coefficients: tuple[float, ...]
    error: float
    parameter: float


def tail(a: Array) -> Array:
    """a * Q(a), what gelu(a) lacks to relu(a), for a >= 0."""
    return 0.5 * a * erfc(a / np.sqrt(2))


def _powers(x: Array, degree: int) -> Array:
    return np.stack([x**k for k in range(degree + 1)], axis=1)


def fit_exp(degree: int, cap: float, steps: int = 24) -> Fit:
    """The best polynomial p with |a * 2**p(a) - t(a)| <= error on [0, cap] and cap * 2**p(cap) <= error.

    For a given error the condition is linear in p, between two logarithms; the error is found by bisection.
    """
    a = np.concatenate([np.linspace(1e-4, 1, 301), np.linspace(1, cap, 701)[1:]])
    matrix, wanted = _powers(a, degree), tail(a)
    low, high, best = 0.0, 1e-2, None
    for _ in range(steps):
        error = (low + high) / 2
        upper = np.log2((wanted + error) / a)
        upper[-1] = min(upper[-1], np.log2(error / cap))
        bounded = wanted > error * (1 + 1e-9)
        lower = np.log2((wanted[bounded] - error) / a[bounded])
        result = linprog(
            np.zeros(degree + 1),
            A_ub=np.concatenate([matrix, -matrix[bounded]]),
            b_ub=np.concatenate([upper, -lower]),
            bounds=[(None, None)] * (degree + 1),
            method="highs",
        )
        if result.status == 0:
            high, best = error, result.x
        else:
            low = error
    if best is None:
        raise RuntimeError(f"no polynomial of degree {degree} comes within 1e-2 with cap={cap}")
    return Fit(tuple(float(c) for c in best), high, cap)


def fit_poly(degree: int, centre: float, zero: float) -> Fit:
    """The best polynomial q with |q(a - centre) - t(a)| <= error on [0, zero] and q <= error beyond."""
    inside = np.linspace(0, zero, 701)
    outside = np.concatenate([np.linspace(zero, 8, 201), [16.0, 64.0, 200.0]])
    matrix = _powers(inside - centre, degree)
    size = np.maximum(1.0, outside - centre) ** degree  # rows of like size
    beyond = _powers(outside - centre, degree) / size[:, None]
    minus = -np.ones((len(inside), 1))
    result = linprog(
        np.r_[np.zeros(degree + 1), 1.0],
        A_ub=np.concatenate(
            [np.hstack([matrix, minus]), np.hstack([-matrix, minus]), np.hstack([beyond, -1 / size[:, None]])]
        ),
        b_ub=np.concatenate([tail(inside), -tail(inside), np.zeros(len(outside))]),
        bounds=[(None, None)] * degree + [(None, -1e-6), (0, None)],  # the highest coefficient takes q down
        method="highs",
    )
    if result.status != 0:
        raise RuntimeError(f"no polynomial of degree {degree} with centre={centre}, zero={zero}: {result.message}")
    return Fit(tuple(float(c) for c in result.x[:-1]), float(result.x[-1]), centre)


def derive_exp3() -> Fit:
    """The degree-3 exponent at the cap, of those tried, with the smallest error."""
    return min((fit_exp(3, cap) for cap in np.arange(3.0, 5.01, 0.125)), key=lambda fit: fit.error)


def derive_poly7() -> Fit:
    """The degree-7 polynomial around 1.5 at the zero, of those tried, with the smallest error."""
    return min((fit_poly(7, 1.5, zero) for zero in np.arange(2.6, 4.6, 0.1)), key=lambda fit: fit.error)


def main() -> None:
    for name, fit in (("exp3", derive_exp3()), ("poly7", derive_poly7())):
        numbers = ", ".join(f"{c:.9g}" for c in fit.coefficients)
        print(f"{name}: parameter {fit.parameter:g}, error {fit.error:.2e}, coefficients from the constant: {numbers}")


if __name__ == "__main__":
    main()
