"""Floating-point formats by exact fractions: what a result must be, found without NumPy and without the machine."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Format:
    """A binary format of IEEE 754's kind."""

    exponent: int
    mantissa: int

    @property
    def size(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def infinity(self) -> int:
        """Its bits."""
        return ((1 << self.exponent) - 1) << self.mantissa

    @property
    def least_exponent(self) -> int:
        return 2 - (1 << self.exponent - 1)

    def value(self, bits: int) -> float:
        """The value of these bits; a Python float holds all of these formats."""
        sign, rest = (-1.0 if bits >> self.size - 1 & 1 else 1.0), bits & (1 << self.size - 1) - 1
        if rest >= self.infinity:
            return math.nan if rest > self.infinity else sign * math.inf
        exponent, fraction = rest >> self.mantissa, rest & (1 << self.mantissa) - 1
        if exponent:
            exponent, fraction = exponent - 1, fraction + (1 << self.mantissa)
        return sign * math.ldexp(fraction, exponent + self.least_exponent - self.mantissa)

    def bits(self, x: Fraction | float, *, negative_zero: bool = False) -> int:
        """The bits nearest to a value, of two equally near ones the even."""
        if isinstance(x, float):
            if math.isnan(x):
                return (1 << self.size - 1) - 1
            if math.isinf(x):
                return self.infinity | (x < 0) << self.size - 1
            negative_zero = math.copysign(1, x) < 0
            x = Fraction(x)
        sign = (x < 0 or (x == 0 and negative_zero)) << self.size - 1
        if x == 0:
            return sign
        x = abs(x)
        exponent = x.numerator.bit_length() - x.denominator.bit_length()
        exponent = max(exponent - (x < Fraction(2) ** exponent), self.least_exponent)
        count = round(x / Fraction(2) ** (exponent - self.mantissa))
        return sign | min(((exponent - self.least_exponent) << self.mantissa) + count, self.infinity)

    def flush(self, bits: int) -> int:
        """A subnormal number becomes zero of its sign."""
        return bits & 1 << self.size - 1 if not bits >> self.mantissa & (1 << self.exponent) - 1 else bits

    def is_nan(self, bits: int) -> bool:
        return bits & (1 << self.size - 1) - 1 > self.infinity

    def same(self, a: int, b: int) -> bool:
        """Whether bits are equal, or both of NaN."""
        return a == b or (self.is_nan(a) and self.is_nan(b))


F16, BF16, F32, F64 = Format(5, 10), Format(8, 7), Format(8, 23), Format(11, 52)


def fma(a: float, b: float, c: float, to: Format) -> int:
    """Bits of a * b + c, rounded once."""
    if not all(map(math.isfinite, (a, b, c))):
        product = a * b if not (math.isfinite(a) and math.isfinite(b)) else 0.0
        return to.bits(product + c)
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    negative = math.copysign(1, a) * math.copysign(1, b) < 0 and math.copysign(1, c) < 0
    return to.bits(exact, negative_zero=negative)


def add(a: float, b: float, to: Format) -> int:
    """Bits of a + b."""
    return to.bits(a + b) if not (math.isfinite(a) and math.isfinite(b)) else fma(1.0, a, b, to)


def multiply(a: float, b: float, to: Format) -> int:
    """Bits of a * b."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return to.bits(a * b)
    negative = math.copysign(1, a) * math.copysign(1, b) < 0
    return to.bits(Fraction(a) * Fraction(b), negative_zero=negative)


def divide(a: float, b: float, to: Format) -> int:
    """Bits of a / b."""
    negative = math.copysign(1, a) * math.copysign(1, b) < 0
    if math.isnan(a) or math.isnan(b) or (a == 0 and b == 0) or (math.isinf(a) and math.isinf(b)):
        return to.bits(math.nan)
    if math.isinf(a) or b == 0:
        return to.bits(-math.inf if negative else math.inf)
    return to.bits(Fraction(0) if math.isinf(b) else Fraction(a) / Fraction(b), negative_zero=negative)


def extreme(a: int, b: int, form: Format, *, largest: bool, nan: bool = False) -> int:
    """Bits of the smaller or the larger: -0 is less than 0, and NaN counts only where it is asked for or alone."""
    if form.is_nan(a) or form.is_nan(b):
        if nan or (form.is_nan(a) and form.is_nan(b)):
            return form.bits(math.nan)
        return b if form.is_nan(a) else a
    order: Callable[[int], tuple[float, float]] = lambda x: (form.value(x), math.copysign(1, form.value(x)))  # noqa: E731
    return (max if largest else min)((a, b), key=order)


def bits_of(x: float) -> int:
    """The bits of a float64."""
    return int.from_bytes(struct.pack("<d", x), "little")
