"""Measurements for the benchmarks' tests: a network, and small calls of the operations."""

from __future__ import annotations

import torch
from effformer.bench.measure.network_providers import Measurement

from effformer.apps.verify_report import Check

ONE = Measurement("efficientformer_l1", 2, "float32", 224, 224)
MLP = Check("conv_mlp", (3, 8, 5, 4), torch.float32, {"hidden": 16}, ("here",))
POOL = Check("pool_mixer", (3, 8, 5, 4), torch.float32, {}, ("here", "there"))
ATTENTION = Check("bias_attention", (3, 9, 2 * 13), torch.float32, {"num_heads": 2, "key_dim": 4, "value_dim": 5}, ())
TOKENS = Check("linear_mlp", (3, 9, 8), torch.float32, {"hidden": 16}, ())
STEM = Check("conv_norm", (3, 3, 7, 6), torch.float32, {"outputs": 8, "activation": "relu"}, ())
DOWN = Check("conv_norm", (3, 4, 7, 6), torch.float32, {"outputs": 8, "activation": None}, ())
BLOCK = Check("meta4d", (3, 8, 5, 4), torch.float32, {"hidden": 16}, ())
