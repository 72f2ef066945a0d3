"""All operators: importing this registers torch.ops.effformer, which a saved export needs to be loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .attention_mixer import attention_mixer
from .bias_attention import bias_attention
from .conv_mlp import conv_mlp
from .conv_norm import conv_norm
from .head import head
from .linear_mlp import linear_mlp
from .meta4d import meta4d
from .meta4d_backward import meta4d_backward as meta4d_backward
from .pool_mixer import pool_mixer
from .pool_mixer_backward import pool_mixer_backward as pool_mixer_backward
from .register import IMPLEMENTATIONS as IMPLEMENTATIONS
from .register import arguments_of

__all__ = ["attention_mixer", "bias_attention", "conv_mlp", "conv_norm", "head", "linear_mlp", "meta4d", "pool_mixer"]


def call(operator: str, x: Tensor, tensors: Sequence[Tensor], options: Mapping[str, Any]) -> Tensor:
    """An operator's result by its kernels, without the dispatcher, for tensors on the meta device as well."""
    return IMPLEMENTATIONS[operator](*arguments_of(operator, (x, *tensors), options))
