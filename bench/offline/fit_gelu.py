"""Derivation of the GELU approximations in `kernels/activation.py`: python -m effformer.bench.offline.fit_gelu

The approximations write gelu(x) = relu(x) - t(|x|) with the tail t(a) = a * Q(a), Q(a) = erfc(a / sqrt(2)) / 2, and fit

    t(a) = b * 2**p(b), b = min(a, cap), p a polynomial of degree 2 to 5

for the smallest e with |error| <= e * min(a, 1): absolute beyond 1, and relative to the argument below it, so that
small activations keep their digits. Needs scipy (extra `bench`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.special import erfc

Array = NDArray[np.float64]
DEGREES = (2, 3, 4, 5)


@dataclass(frozen=True)
class Fit:
    """Coefficients of p from the constant on, e in exact arithmetic, and the cap."""

    coefficients: tuple[float, ...]
    error: float
    cap: float


def tail(a: Array) -> Array:
    """a * Q(a) = relu(a) - gelu(a), for a >= 0."""
    return 0.5 * a * erfc(a / np.sqrt(2))


def fit(degree: int, cap: float, steps: int = 24) -> Fit:
    """The best p at this cap.

    For a given e the conditions are linear in p, which lies between two logarithms. Bisection finds e.
    """
    a = np.concatenate([np.linspace(1e-4, 1, 301), np.linspace(1, cap, 701)[1:]])
    matrix, wanted, allowed = np.stack([a**k for k in range(degree + 1)], axis=1), tail(a), np.minimum(a, 1)
    low, high, best = 0.0, 1e-1, None
    for _ in range(steps):
        error = (low + high) / 2
        upper = np.log2((wanted + error * allowed) / a)
        upper[-1] = min(upper[-1], np.log2(error / cap))  # the tail from the cap on is cap * 2**p(cap)
        bounded = wanted > error * allowed * (1 + 1e-9)
        lower = np.log2((wanted[bounded] - error * allowed[bounded]) / a[bounded])
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
        raise RuntimeError(f"no polynomial of degree {degree} comes within 0.1 with cap={cap}")
    return Fit(tuple(float(c) for c in best), high, cap)


def main() -> None:
    for degree in DEGREES:
        found = min((fit(degree, float(cap)) for cap in np.arange(2.5, 5.51, 0.125)), key=lambda found: found.error)
        numbers = ", ".join(f"{c:.9g}" for c in found.coefficients)
        print(f"exp{degree}: error {found.error:.2e}, cap {found.cap:g}, coefficients from the constant: {numbers}")


if __name__ == "__main__":
    main()
