"""Seconds of first forwards, which compile their kernels, without a GPU (`make first-call`).

The kernels of a live network are compiled as for an H100, over the stub driver, with nothing on Triton's disk cache.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from unittest import mock

import torch

from ...config import PRESETS, EfficientFormerConfig
from ...kernels import operators, plan  # noqa: F401  # imports do not count
from ...model.network import EfficientFormer
from .stub import stub_driver

Shape = tuple[int, int, int]
SHAPES: tuple[Shape, ...] = (1, 224, 224), (1, 256, 320), (256, 224, 224)


@torch.no_grad()
def measure(config: EfficientFormerConfig, shapes: Sequence[Shape], threads: int) -> list[float]:
    """Seconds of the first forward of each shape (batch, height, width) in float16, one after the other.

    Raises:
        RuntimeError: where there can be no stub driver.
    """
    network = EfficientFormer(config, backend="triton").eval().half()
    found = []
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache),
        mock.patch.object(os, "cpu_count", return_value=threads),
        stub_driver(),
    ):
        for batch, height, width in shapes:
            images = torch.zeros(batch, 3, height, width, dtype=torch.float16)
            start = time.perf_counter()
            network(images)
            found.append(time.perf_counter() - start)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="efficientformer_l1", choices=PRESETS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="kernels compiled at a time")
    options = parser.parse_args(arguments)
    for shape, seconds in zip(SHAPES, measure(PRESETS[options.model], SHAPES, options.threads), strict=True):
        size = "x".join(map(str, shape))
        print(f"{options.model}, float16, {size:<11} {seconds:6.1f} s, {options.threads} at a time")


if __name__ == "__main__":
    main()
