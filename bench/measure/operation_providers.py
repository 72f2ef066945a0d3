"""Providers of the fused operations in `effformer bench kernels`: our kernels, eager PyTorch, torch.compile, libraries.

A form of a provider turns a case into a call. Padded masks and folded weights do not depend on the input and are
prepared before the call, as in serving. A provider with several forms is as fast as its fastest.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ...apps.verify import why_not_verified
from ...testing import Case

Form = Callable[[Case], Callable[[], Tensor]]

OURS = "ours"


@dataclass(frozen=True)
class OperationProvider:
    """One way to compute fused operations.

    Attributes:
        name: as in the records.
        forms: name -> form, for a device; built anew for each case.
        operations: that it computes; None for all.
        why_not: the reason why it cannot be timed on a device in a dtype, None where it can.
    """

    name: str
    forms: Callable[[torch.device], dict[str, Form]]
    operations: tuple[str, ...] | None = None
    why_not: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None

    def computes(self, operation: str) -> bool:
        return self.operations is None or operation in self.operations


# --- ours, and plain PyTorch ------------------------------------------------------------------------------------------


def _of_backend(backend: str) -> Callable[[torch.device], dict[str, Form]]:
    return lambda device: {backend: lambda case: lambda: case.run(backend)}


def _why_not_ours(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "interpreted kernels are not timed: there is no GPU"
    return why_not_verified(device, dtype)


def _compiled(device: torch.device) -> dict[str, Form]:
    @functools.cache
    def compiled(operation: str) -> Callable[..., Tensor]:
        return torch.compile(getattr(reference, operation), fullgraph=True, dynamic=False)

    return {"default": lambda case: lambda: compiled(case.operation)(*case.arguments, **case.options)}


# --- attention --------------------------------------------------------------------------------------------------------


def _sdpa(device: torch.device) -> dict[str, Form]:
    """F.scaled_dot_product_attention with the bias as its mask, in lines padded to a multiple of 8 for its efficient
    kernels.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def by(backend: Any) -> Form:
        def form(case: Case) -> Callable[[], Tensor]:
            qkv, bias = case.arguments
            tokens = bias.shape[-1]
            padded = qkv.new_zeros(*bias.shape[:-1], -(-tokens // 8) * 8)
            padded[..., :tokens] = bias
            mask = padded[..., :tokens].expand(qkv.shape[0], -1, -1, -1)

            def call() -> Tensor:
                q, k, v = reference.split_heads(qkv, **case.options)
                with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
                    values = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
                return values.transpose(1, 2).flatten(2)

            return call

        return form

    if device.type != "cuda":
        return {"default": by(None)}
    return {"efficient": by(SDPBackend.EFFICIENT_ATTENTION), "cuDNN": by(SDPBackend.CUDNN_ATTENTION)}


def _flex(device: torch.device) -> dict[str, Form]:
    """FlexAttention, compiled, whose score_mod adds the bias; on a GPU also by its kernel for long queries."""
    from torch.nn.attention.flex_attention import flex_attention

    def attention(qkv: Tensor, bias: Tensor, num_heads: int, key_dim: int, long: bool) -> Tensor:
        def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + bias[h, i, j]

        q, k, v = reference.split_heads(qkv, num_heads=num_heads, key_dim=key_dim)
        # Queries of fewer than 128 tokens go to a kernel for decoding, unless told otherwise.
        options: Any = {"FORCE_USE_FLEX_ATTENTION": True} if long else None
        values: Tensor = flex_attention(q, k, v, score_mod=add_bias, kernel_options=options)
        return values.transpose(1, 2).flatten(2)

    compiled: Callable[..., Tensor] = torch.compile(attention, fullgraph=True, dynamic=False)

    def by(long: bool) -> Form:
        return lambda case: lambda: compiled(*case.arguments, **case.options, long=long)

    return {"default": by(False)} | ({"long": by(True)} if device.type == "cuda" else {})


# --- MLPs -------------------------------------------------------------------------------------------------------------


def _epilogues(device: torch.device) -> dict[str, Form]:
    """The products by cuBLASLt, bias and GELU in the first one's epilogue, the bias in the second's.

    Scales are folded into the weights and rounded with them. GELU is the tanh form there (on a CPU the exact one). A
    4D block's pooling is compiled by Inductor.
    """
    pool = torch.compile(reference.pool_mixer, fullgraph=True, dynamic=False)

    def form(case: Case) -> Callable[[], Tensor]:
        if case.options["activation"] != "gelu":
            raise ValueError(f"activation: got {case.options['activation']}, allowed is gelu")
        x, *others = case.arguments
        dtype = x.dtype
        if case.operation == "linear_mlp":
            norm_weight, norm_bias, weight1, shift1, weight2, scale2, shift2 = others
            norm, eps = (norm_weight.to(dtype), norm_bias.to(dtype)), case.options["eps"]

            def mlp() -> Tensor:
                return x + products(F.layer_norm(x, x.shape[-1:], *norm, eps).flatten(0, 1)).view_as(x)
        else:
            layer_scale = others[0]
            weight1, scale1, shift1, weight2, scale2, shift2 = others[-6:]
            weight1 = (weight1 * scale1[:, None]).to(dtype)

            def mlp() -> Tensor:
                y = pool(x, layer_scale) if case.operation == "meta4d" else x
                lines = y.permute(0, 2, 3, 1)
                return y + products(lines.flatten(0, 2)).view_as(lines).permute(0, 3, 1, 2)

        bias1, bias2 = shift1.to(dtype), shift2.to(dtype)
        weight2 = (weight2 * scale2[:, None]).to(dtype)

        def products(rows: Tensor) -> Tensor:
            hidden = torch._addmm_activation(bias1, rows, weight1.T, use_gelu=True)
            return F.linear(hidden, weight2, bias2)

        return mlp

    return {"default": form}


# --- convolutions -----------------------------------------------------------------------------------------------------


def _convolutions(device: torch.device) -> dict[str, Form]:
    """The vendor's convolution, the norm folded into its weight and bias, channels_last; ReLU in its epilogue or after.

    The padding is 0: a border is another operation.
    """

    def by(*, fused: bool) -> Form:
        def form(case: Case) -> Callable[[], Tensor]:
            activation = case.options["activation"]
            if activation not in (None, "relu") or case.options.get("border") is not None:
                raise ValueError(f"activation: got {activation}, allowed are None and relu, without a border")
            x, weight, scale, shift = case.arguments
            folded = (weight * scale[:, None, None, None]).to(weight.dtype, memory_format=torch.channels_last)
            bias, relu = shift.to(weight.dtype), activation == "relu"

            def call() -> Tensor:
                if relu and fused:
                    return torch.cudnn_convolution_relu(x, folded, bias, (2, 2), (1, 1), (1, 1), 1)
                y = F.conv2d(x, folded, bias, stride=2, padding=1)
                return y.relu_() if relu else y

            return call

        return form

    return {"plain": by(fused=False)} | ({"fused": by(fused=True)} if device.type == "cuda" else {})


PROVIDERS = (
    OperationProvider(OURS, _of_backend("triton"), why_not=_why_not_ours),
    OperationProvider("eager", _of_backend("eager")),
    OperationProvider("torch.compile", _compiled),
    OperationProvider("SDPA", _sdpa, ("bias_attention",)),
    OperationProvider("FlexAttention", _flex, ("bias_attention",)),
    OperationProvider("cuBLAS epilogue", _epilogues, ("conv_mlp", "meta4d", "linear_mlp")),
    OperationProvider("folded convolution", _convolutions, ("conv_norm",)),
)
