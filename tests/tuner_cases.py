"""The GPU of the tuner's tests, and the tiles that the table has for their question."""

from __future__ import annotations

import torch
from effformer.kernels.tiling import choose as config
from effformer.kernels.tiling.choose import Question
from effformer.kernels.tiling.device import HOPPER, Device
from effformer.kernels.tiling.table import MlpConfig

H200 = Device(90, 232_448, "NVIDIA H200")
OWN = config.mlp_config(Question("meta4d", torch.float16, (32, 144)), HOPPER)  # the table's
assert isinstance(OWN, MlpConfig)
