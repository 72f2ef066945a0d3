"""Who computes the fused operations, and why.

"eager"   `effformer.reference`, differentiable, any device and floating dtype
"triton"  the kernels, or an `UnsupportedError`; never something else silently
"auto"    Triton where it can run, eager elsewhere; `why_not_triton` says why
"""

from __future__ import annotations

import importlib.util
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .checks import products_dtype
from .config import check_choice

Backend = Literal["auto", "eager", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_ACTIVATIONS = ("gelu", "relu", "silu", "swish", "hard_swish")
TRITON_CAPABILITY = (8, 0)


class UnsupportedError(RuntimeError):
    """backend="triton" was asked for something that the kernels do not do."""


def select_backend(
    backend: str, *tensors: Tensor, activation: str = "gelu", products: bool = True
) -> Literal["eager", "triton"]:
    """The implementation that `backend` stands for, for an operation on these tensors, the input being the first.

    `products`: whether there are matrix products, which autocast computes in a dtype of its own.

    Raises:
        ValueError: for an unknown backend.
        UnsupportedError: for "triton" where the kernels cannot run.
    """
    check_choice("backend", backend, BACKENDS)
    if backend == "eager":
        return "eager"
    x = tensors[0]
    backward = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if backward or forward_ad._current_level >= 0:  # tensors do not show that they carry a tangent
        reason: str | None = "a gradient is needed, and the kernels have none: use torch.no_grad() or backend='eager'"
    else:
        reason = why_not_triton(x.device, x.dtype, activation, backend == "triton")
        if reason is None and products and (dtype := products_dtype(x)) != x.dtype:
            reason = why_not_triton(x.device, dtype, activation, backend == "triton")
    refuse_triton(backend, reason)
    return "eager" if reason else "triton"


def refuse_triton(backend: str, reason: str | None) -> None:
    """Raise an UnsupportedError if `backend` is "triton" and, for `reason`, something else is about to compute."""
    if backend == "triton" and reason:
        raise UnsupportedError(f"backend='triton': {reason}")


def why_not_triton(
    device: torch.device, dtype: torch.dtype | None = None, activation: str = "gelu", asked_for: bool = False
) -> str | None:
    """Why "auto" takes eager for tensors on `device`, None where it takes Triton.

    With `asked_for`, why "triton" cannot run there: on a CPU it can, where Triton interprets (TRITON_INTERPRET=1).
    Without a `dtype` the answer is that of the device.
    """
    if (reason := _why_not_device(device, dtype, asked_for)) is not None:
        return reason
    if dtype is not None and dtype not in TRITON_DTYPES:
        return f"the kernels compute {_listed(TRITON_DTYPES)}, not {dtype}"
    if activation not in TRITON_ACTIVATIONS:
        return f"the kernels compute the activations {', '.join(TRITON_ACTIVATIONS)}, not {activation!r}"
    return None


# What torch.compiler.assume_constant_result does: compilers take the answer instead of tracing the question. That
# function imports torch._dynamo, and with it Triton, for which `import effformer` has no use.
why_not_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _why_not_device(device: torch.device, dtype: torch.dtype | None, asked_for: bool) -> str | None:
    if device.type not in ("cuda", "cpu") or (device.type == "cpu" and not asked_for):
        return f"{device.type!r} is no NVIDIA GPU"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        from .kernels.launch import INTERPRETED

        if not INTERPRETED:
            return "'cpu' is no NVIDIA GPU, and Triton interprets only in a process started with TRITON_INTERPRET=1"
        return "Triton's interpreter does not compute torch.bfloat16" if dtype == torch.bfloat16 else None
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this is ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < TRITON_CAPABILITY:
        return f"the kernels need compute capability 8.0, and {torch.cuda.get_device_name(device)} has " + ".".join(
            map(str, capability)
        )
    return None


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(map(str, dtypes))
