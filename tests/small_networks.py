"""Networks of L1's widths with few blocks, for tests of everything but speed."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch

import effformer
from effformer.testing import randomise

DEPTHS = (1, 1, 1, 2)  # the last block is a 3D one


@functools.cache
def _small(seed: int, **overrides: Any) -> effformer.EfficientFormer:
    torch.manual_seed(seed)
    network = effformer.create_model("efficientformer_l1", **({"depths": DEPTHS, "num_classes": 10} | overrides))
    randomise(network, seed=seed)
    return network.eval()


def small(seed: int = 0, **overrides: Any) -> effformer.EfficientFormer:
    """A network with random weights and statistics, of 10 classes, in eval mode; another object at each call."""
    return copy.deepcopy(_small(seed, **overrides))
