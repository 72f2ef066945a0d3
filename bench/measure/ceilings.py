"""The best that a device reaches: by a large matrix product, and a copy of more than any cache holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...apps.verify_report import describe_dtype
from ...testing import float32_as_such
from .records import Machine, Record
from .roofline import Ceilings
from .timing import Timer, Timing, device_time

GPU_SIDE, CPU_SIDE = 8192, 512  # of the matrices
GPU_BYTES, CPU_BYTES = 2**30, 2**28  # that are copied, far more than a cache holds


@dataclass(frozen=True)
class CeilingTimes:
    """Times of the product of two [side, side] matrices and of the copy of `copied` bytes, and ceilings by them."""

    dtype: torch.dtype
    side: int
    product: Timing
    copied: int
    copy: Timing

    @property
    def ceilings(self) -> Ceilings:
        """From the medians; a copy counts bytes read and bytes written."""
        return Ceilings(2e3 * self.side**3 / self.product.p50, 1e3 * 2 * self.copied / self.copy.p50)

    def records(self, machine: Machine) -> list[Record]:
        """Operation "matmul" in TFLOP/s, of shape [M, N, K], and "copy" in GB/s, of shape [elements]."""
        product = speed(2 * self.side**3 / 1e12, self.product)
        copy = speed(2 * self.copied / 1e9, self.copy)
        name, elements = describe_dtype(self.dtype), self.copied // self.dtype.itemsize
        return [
            Record("matmul", "torch", "forward", name, (self.side,) * 3, "TFLOP/s", product[1], machine,
                   p20=product[0], p80=product[2]),
            Record("copy", "torch", "forward", name, (elements,), "GB/s", copy[1], machine, p20=copy[0], p80=copy[2]),
        ]  # fmt: skip


def measure_ceilings(device: torch.device, dtype: torch.dtype, *, timer: Timer = device_time) -> CeilingTimes:
    """Measure a device, in `dtype`: on normally distributed numbers, since a GPU is faster on zeros.

    float32 products are float32's own (no TF32).

    Args:
        device: a GPU or a CPU.
        dtype: of the matrices and of the copied elements.
        timer: `device_time`.
    """
    side, copied = (GPU_SIDE, GPU_BYTES) if device.type == "cuda" else (CPU_SIDE, CPU_BYTES)

    def product() -> Callable[[], object]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        return lambda: a @ b

    def copy() -> Callable[[], object]:
        x = torch.randn(copied // dtype.itemsize, device=device).to(dtype)
        y = torch.empty_like(x)
        return lambda: y.copy_(x)

    with torch.no_grad(), float32_as_such():
        of_product = timer(product, device, 3 * side**2 * dtype.itemsize)
        return CeilingTimes(dtype, side, of_product, copied, timer(copy, device, 2 * copied))


def speed(amount: float, timing: Timing) -> tuple[float, float, float]:
    """(20th, 50th, 80th percentile) of `amount` a second; the slowest speeds come from the longest times."""
    return 1e3 * amount / timing.p80, 1e3 * amount / timing.p50, 1e3 * amount / timing.p20
