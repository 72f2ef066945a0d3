"""The 4D block in training as one fused operation: its arguments, its checks, its gradients, its choice of backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.fx
from torch import Tensor
from torch.autograd import Function

from . import reference
from .backend import UnsupportedError, needs_gradient, products_dtype, select_backend
from .checks import check_choice, check_map, check_mlp, check_vectors
from .gradients import given, with_products

if TYPE_CHECKING:
    import torch.distributed as dist

# Of the operator: x and the parameters, with keep1 and keep2, and with the statistics.
_TRAINED, _DRAWN, _TENSORS = 11, 13, 17


class TrainingResult(NamedTuple):
    """The result of `meta4d_train`, and the statistics that it used, float32 (float64 if x is).

    `values` is the number of values a channel that they are of, or a tensor of it where other processes take part.
    """

    result: Tensor
    mean1: Tensor
    var1: Tensor
    mean2: Tensor
    var2: Tensor
    values: Tensor | int


@torch.fx.wrap
def meta4d_train(
    x: Tensor,
    layer_scale1: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    norm_weight1: Tensor,
    norm_bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor | None,
    norm_weight2: Tensor,
    norm_bias2: Tensor,
    layer_scale2: Tensor,
    keep1: Tensor | None = None,
    keep2: Tensor | None = None,
    mean1: Tensor | None = None,
    var1: Tensor | None = None,
    mean2: Tensor | None = None,
    var2: Tensor | None = None,
    *,
    eps1: float = 1e-5,
    eps2: float = 1e-5,
    activation: str = "gelu",
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> TrainingResult:
    """A whole 4D MetaBlock in training: y + keep2 * layer_scale2 * norm2(W2 · act(norm1(W1 · y + bias1)) + bias2).

    y is x + keep1 * layer_scale1 * (avg_pool3x3(x) - x), and the norms are BatchNorm (paper section 4, MB4D). Without
    given statistics they use those of the batch; then the gradients of the biases are 0.

    Args:
        x: [B, C, H, W], floating.
        layer_scale1, layer_scale2: [C].
        weight1, weight2: [hidden, C] and [C, hidden], x's dtype (any floating one under autocast).
        bias1, norm_weight1, norm_bias1: [hidden]; bias2, norm_weight2, norm_bias2: [C]. The biases may be None.
        keep1, keep2: [B], stochastic depth's factors of the two branches, 0 or 1 / (1 - rate); None without it.
        mean1, var1, mean2, var2: [hidden] and [C], statistics to use; None, all four of them, for the batch's.
        eps1, eps2: of the norms.
        activation: one of `ops.ACTIVATIONS`; "gelu" is the exact form.
        process_group: whose processes share the batch's statistics, each with images of its own, as by
            `torch.nn.SyncBatchNorm`; the kernels alone compute this. None for this process alone.
        backend: "auto", "eager" or "triton".

    All vectors are float32 (float64 if x is).

    Returns:
        The result [B, C, H, W] in x's dtype, and the statistics that the norms used. Variances are divided by the
        number of values.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, activation or backend, naming the argument; for the statistics
            of fewer than two values a channel.
        UnsupportedError: for backend="triton" where the kernels cannot run.
    """
    check_map(x)
    check_choice("activation", activation, tuple(reference.ACTIVATIONS))
    statistics = {"mean1": mean1, "var1": var1, "mean2": mean2, "var2": var2}
    given_ones = [name for name, one in statistics.items() if one is not None]
    if given_ones and len(given_ones) < len(statistics):
        raise ValueError(f"mean1, var1, mean2, var2: got {', '.join(given_ones)} alone, allowed are all or none")
    batch, channels, height, width = x.shape
    if not given_ones and batch * height * width < (2 if process_group is None else 1):
        raise ValueError(f"x: got shape {list(x.shape)}, allowed are two values a channel or more for statistics")
    without = {"keep1": keep1, "keep2": keep2, **statistics}
    for name, one in without.items():
        if one is not None and needs_gradient(one):
            raise ValueError(f"{name}: got a tensor that needs a gradient, allowed is one that does not")
    norms = {"norm_weight1": norm_weight1, "norm_bias1": norm_bias1}
    norms |= {"norm_weight2": norm_weight2, "norm_bias2": norm_bias2}
    optional = {"bias1": bias1, "bias2": bias2, **statistics}
    check_mlp(
        x, channels, weight1, weight2, **norms, **{name: one for name, one in optional.items() if one is not None}
    )
    check_vectors(x, channels, layer_scale1=layer_scale1, layer_scale2=layer_scale2)
    check_vectors(x, batch, **{name: one for name, one in (("keep1", keep1), ("keep2", keep2)) if one is not None})
    tensors = (
        x, layer_scale1, weight1, bias1, norm_weight1, norm_bias1, weight2, bias2, norm_weight2, norm_bias2,
        layer_scale2, keep1, keep2, mean1, var1, mean2, var2,
    )  # fmt: skip
    there = [one for one in tensors if one is not None]
    count = batch * height * width
    if select_backend(backend, *there, activation=activation, differentiable=True) == "eager":
        if process_group is not None:
            raise UnsupportedError("process_group: got one, allowed is None where eager PyTorch computes")
        return TrainingResult(*reference.meta4d_train(*tensors, eps1=eps1, eps2=eps2, activation=activation), count)
    options = eps1, eps2, activation, "" if process_group is None or given_ones else process_group.group_name
    dtype = products_dtype(x)
    compute: Callable[..., Any] = _Train.apply if needs_gradient(*there) else _by_kernels
    found = compute(options, dtype, *tensors)
    if mean1 is not None and var1 is not None and mean2 is not None and var2 is not None:
        return TrainingResult(found[0], mean1, var1, mean2, var2, count)
    first, second = (
        one if bias is None else one + bias.detach() for one, bias in ((found[2], bias1), (found[4], bias2))
    )
    return TrainingResult(found[0], first, found[3], second, found[5], found[8] if process_group else count)


def _by_kernels(options: tuple[Any, ...], dtype: torch.dtype, *tensors: Tensor | None) -> Sequence[Tensor]:
    """Result, o, mean1, var1, mean2, var2, of the batch the mean and covariance of y, and its number of values."""
    from .kernels import operators

    found: Sequence[Tensor] = operators.meta4d_train(*with_products(tensors, dtype), *options)  # type: ignore[assignment]
    return found


class _Train(Function):
    @staticmethod
    def forward(options: tuple[Any, ...], dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(_by_kernels(options, dtype, *tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options, ctx.dtype, *tensors = inputs
        ctx.save_for_backward(*tensors[:_DRAWN], *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
        from .kernels import operators

        needed = list(ctx.needs_input_grad[2 : 2 + _TRAINED])
        behind = (None,) * (_TENSORS - _TRAINED)
        if grad is None:
            return (None, None, *(None for _ in needed), *behind)
        saved = ctx.saved_tensors  # once: checkpointing unpacks them anew each time
        with torch.no_grad():
            tensors = [*with_products(saved[:_DRAWN], ctx.dtype), *saved[_DRAWN:]]
            found = operators.meta4d_train_backward(grad, *tensors, *ctx.options, needed)
        return None, None, *given(found, saved[:_TRAINED], needed, grad), *behind
