"""The choice between PyTorch and the Triton kernels for the fused operations.

"eager"   `effformer.reference`: differentiable, any device and floating dtype
"triton"  the kernels; an `UnsupportedError` where they cannot run
"auto"    the kernels where they can run, eager elsewhere; `why_not_triton` gives the reason
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .checks import check_choice

Backend = Literal["auto", "eager", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_ACTIVATIONS = ("gelu", "relu", "silu", "swish", "hard_swish")
TRITON_CAPABILITY = (8, 0)


class UnsupportedError(RuntimeError):
    """backend="triton" was asked for, and the kernels cannot run."""


def autocast(device_type: str) -> bool:
    """Whether autocast is on for this type of device; only "cuda" and "cpu" are looked at."""
    return device_type in ("cuda", "cpu") and torch.is_autocast_enabled(device_type)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A context without autocast, for weights that all have one dtype."""
    return torch.autocast(device.type, enabled=False) if autocast(device.type) else contextlib.nullcontext()


def products_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products for an input x: autocast's where it is on, else x's."""
    return torch.get_autocast_dtype(x.device.type) if autocast(x.device.type) else x.dtype


def select_backend(backend: str, *tensors: Tensor, **operation: Any) -> Literal["eager", "triton"]:
    """Resolve `backend` for an operation on these tensors; `operation` as for `why_eager`.

    Raises:
        ValueError: for an unknown backend.
        UnsupportedError: for "triton" where the kernels cannot run.
    """
    check_choice("backend", backend, BACKENDS)
    reason = why_eager(backend, *tensors, **operation)
    refuse_triton(backend, reason)
    return "eager" if reason else "triton"


def why_eager(
    backend: str,
    *tensors: Tensor,
    activation: str = "gelu",
    products: bool = True,
    norm: bool = False,
    key_dim: int | None = None,
    differentiable: bool = False,
) -> str | None:
    """The reason why an operation takes eager with this backend, or cannot take "triton"; None where it takes Triton.

    Args:
        backend: "auto" takes eager beyond the sizes that the kernels compute; "triton" leaves the error to them.
        tensors: of the operation, the input first.
        activation: of the operation.
        products: whether it has matrix products, which autocast computes in a dtype of its own.
        norm: whether it has a LayerNorm.
        key_dim: of its attention.
        differentiable: whether kernels compute its gradients. No GPU has run these yet, so "auto" does not take them.
    """
    if backend == "eager":
        return "backend='eager'"
    x = tensors[0]
    if forward_ad._current_level >= 0:  # a tensor does not show that it carries a tangent
        return "a gradient is needed, in forward mode, and the kernels have none: use backend='eager'"
    if needs_gradient(*tensors):
        if not differentiable:
            return "a gradient is needed, and the kernels have none: use torch.no_grad() or backend='eager'"
        if backend == "auto":
            return "a gradient is needed: only backend='triton' takes kernels for it"
    reason = why_not_triton(x.device, x.dtype, activation, backend == "triton")
    if reason is None and products and (dtype := products_dtype(x)) != x.dtype:
        reason = why_not_triton(x.device, dtype, activation, backend == "triton")
    if reason is None and backend == "auto":
        reason = _why_too_large(tensors, norm, key_dim)
    return reason


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether the result of an operation on these tensors will be differentiated, as far as can be told."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _why_too_large(tensors: Sequence[Tensor], norm: bool, key_dim: int | None) -> str | None:
    """The reason why the kernels do not compute tensors of these sizes, of which the first is the input."""
    from .kernels import limits

    x = tensors[0]
    reasons = [limits.beyond_map(one.shape[2], one.shape[3]) for one in tensors if one.ndim == 4]
    if norm:
        reasons.append(limits.beyond_norm(x.shape[2]))
    if key_dim is not None:
        reasons.append(limits.beyond_attention(key_dim, products_dtype(x), x.device))
    return next(filter(None, reasons), None)


def refuse_triton(backend: str, reason: str | None) -> None:
    """Raise an UnsupportedError if `backend` is "triton" and there is a `reason` why the kernels cannot run."""
    if backend == "triton" and reason:
        raise UnsupportedError(f"backend='triton': {reason}")


def why_not_triton(
    device: torch.device, dtype: torch.dtype | None = None, activation: str = "gelu", asked_for: bool = False
) -> str | None:
    """The reason why "auto" takes eager for tensors on `device`; None where it takes Triton.

    With `asked_for`, the reason why "triton" cannot run there. On a CPU it runs under Triton's interpreter, in a
    process started with TRITON_INTERPRET=1. Without a `dtype` only the device is looked at.
    """
    if (reason := _why_not_device(device, dtype, asked_for)) is not None:
        return reason
    if dtype is not None and dtype not in TRITON_DTYPES:
        return f"the kernels compute {', '.join(map(str, TRITON_DTYPES))}, not {dtype}"
    if activation not in TRITON_ACTIVATIONS:
        return f"the kernels compute the activations {', '.join(TRITON_ACTIVATIONS)}, not {activation!r}"
    return None


# As by torch.compiler.assume_constant_result: compilers take the answer and do not trace the function. The decorator
# itself would import torch._dynamo and Triton, which `import effformer` does not need.
why_not_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _why_not_device(device: torch.device, dtype: torch.dtype | None, asked_for: bool) -> str | None:
    if device.type not in ("cuda", "cpu") or (device.type == "cpu" and not asked_for):
        return f"{device.type!r} is not an NVIDIA GPU"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        from .kernels.launch import INTERPRETED

        if not INTERPRETED:
            return "'cpu' is not an NVIDIA GPU, and Triton interprets only in a process started with TRITON_INTERPRET=1"
        return "Triton's interpreter does not compute torch.bfloat16" if dtype == torch.bfloat16 else None
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this is ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < TRITON_CAPABILITY:
        return f"the kernels need compute capability 8.0, and {torch.cuda.get_device_name(device)} has " + ".".join(
            map(str, capability)
        )
    return None
