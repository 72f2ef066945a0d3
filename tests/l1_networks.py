"""L1 networks for tests of checkpoints, and the check that all weights were loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effformer import create_model

DENSE: dict[str, Any] = {
    "num_classes": 0,
    "bias_resize": "matrix-bicubic",
    "table_resolution": 16,
    "feature_norm": "tap",
}


def fresh(**kwargs: Any) -> nn.Module:
    return create_model("efficientformer_l1", **kwargs)


def assert_loaded(network: nn.Module, state: dict[str, Tensor]) -> None:
    loaded = network.state_dict()
    for key, value in state.items():
        assert torch.equal(loaded[key], value.to(loaded[key].dtype)), key
