"""All operators: importing this registers torch.ops.effformer, which a saved export needs to be loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .attention_mixer import attention_mixer
from .attention_mixer_backward import attention_mixer_backward as attention_mixer_backward
from .bias_attention import bias_attention
from .bias_attention_backward import bias_attention_backward as bias_attention_backward
from .conv_mlp import conv_mlp
from .conv_norm import conv_norm
from .head import head
from .linear_mlp import linear_mlp
from .linear_mlp_backward import linear_mlp_backward as linear_mlp_backward
from .meta4d import meta4d
from .meta4d_backward import meta4d_backward as meta4d_backward
from .meta4d_train import meta4d_train as meta4d_train
from .meta4d_train_backward import meta4d_train_backward as meta4d_train_backward
from .pool_mixer import pool_mixer
from .pool_mixer_backward import pool_mixer_backward as pool_mixer_backward
from .register import IMPLEMENTATIONS as IMPLEMENTATIONS
from .register import arguments_of

__all__ = ["attention_mixer", "bias_attention", "conv_mlp", "conv_norm", "head", "linear_mlp", "meta4d", "pool_mixer"]


def call(operator: str, x: Tensor, tensors: Sequence[Tensor], options: Mapping[str, Any]) -> Tensor:
    """An operator's result by its kernels, without the dispatcher, for tensors on the meta device as well."""
    return IMPLEMENTATIONS[operator](*arguments_of(operator, (x, *tensors), options))
