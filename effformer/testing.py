"""Tools for tests: random weights and arguments, and errors against float64.

`randomise` gives a network weights that show what its initial values would hide. A `Case` is one call of a fused
operation with random arguments. `Case.accuracy` compares its result with `effformer.reference` in float64, by the rule
of `Accuracy`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import ops, reference
from .accuracy import Accuracy as Accuracy
from .accuracy import accuracy as accuracy
from .checks import check_choice
from .model.blocks import Attention
from .model.parts import LayerScale
from .workload import OPERATIONS

LAYOUTS = ("channels_last", "cropped", "contiguous", "sliced", "expanded")


@dataclass(frozen=True)
class Case:
    """One call of `effformer.ops.<operation>`; tensors in `arguments`, the input first."""

    operation: str
    arguments: tuple[Tensor, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> Case:
        """The same call with its tensors on `device`: values from a CPU's generator are the same on every machine."""
        options = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.options.items()
        }
        return Case(self.operation, tuple(argument.to(device) for argument in self.arguments), options)

    @torch.no_grad()
    def run(self, backend: str) -> Tensor:
        """The result by this backend."""
        result: Tensor = getattr(ops, self.operation)(*self.arguments, **self.options, backend=backend)
        return result

    @torch.no_grad()
    def exact(self) -> Tensor:
        """The result of `effformer.reference` in float64."""
        result: Tensor = getattr(reference, self.operation)(*(a.double() for a in self.arguments), **self.options)
        return result

    def accuracy(self, backend: str) -> Accuracy:
        """The error of this backend's result against the exact one, and eager's."""
        return accuracy(self.run(backend), self.exact(), self.run("eager"))


def draw_map(shape: Sequence[int], dtype: torch.dtype, layout: str = "channels_last") -> Tensor:
    """A normally distributed [B, C, H, W] in one of `LAYOUTS`.

    "cropped" leaves out the first line and column of a larger channels_last map. "sliced" does so of a larger
    contiguous one, and takes every other channel. "expanded" repeats one image over the batch without a copy.

    Raises:
        ValueError: for another layout.
    """
    check_choice("layout", layout, LAYOUTS)
    batch, channels, height, width = shape
    if layout == "channels_last":
        return torch.randn(batch, height, width, channels).to(dtype).permute(0, 3, 1, 2)
    if layout == "cropped":
        return torch.randn(batch, height + 1, width + 1, channels).to(dtype).permute(0, 3, 1, 2)[:, :, 1:, 1:]
    if layout == "contiguous":
        return torch.randn(batch, channels, height, width).to(dtype)
    if layout == "sliced":
        return torch.randn(batch, 2 * channels, height + 1, width + 1).to(dtype)[:, ::2, 1:, 1:]
    return torch.randn(1, channels, height, width).to(dtype).expand(batch, -1, -1, -1)


def draw_case(
    operation: str, shape: Sequence[int], dtype: torch.dtype, layout: str = "channels_last", **options: Any
) -> Case:
    """A call of an operation on a random input.

    Args:
        operation: one of `effformer.workload.OPERATIONS`.
        shape: of the input.
        dtype: of input and weights.
        layout: of a map, one of `LAYOUTS`.
        options: as in `effformer.workload.Work`, or what else `<operation>_case` takes.

    Raises:
        ValueError: for another operation or layout.
    """
    check_choice("operation", operation, OPERATIONS)
    draw = globals()[f"{operation}_case"]
    match OPERATIONS[operation]:
        case "map":
            case: Case = draw(draw_map(shape, dtype, layout), **options)
        case "tokens":
            case = draw(torch.randn(*shape).to(dtype), **options)
        case _:
            case = draw(*shape[:2], dtype, **options)
    return case


def draw_gradient(case: Case, seed: int = 0) -> Tensor:
    """A random gradient of a call's result. Its channels have means: without them sums would hide errors."""
    x, generator = case.arguments[0], torch.Generator().manual_seed(seed)
    shape, place = list(x.shape), 1 if x.ndim == 4 else 2
    if case.operation == "bias_attention":
        shape[2] -= 2 * case.options["num_heads"] * case.options["key_dim"]
    means = torch.randn(shape[place], generator=generator, device="cpu")
    means = means[:, None, None] if place == 1 else means
    return (torch.randn(shape, generator=generator, device="cpu") + 0.5 * means).to(x.device, x.dtype)


def draw_vector(size: int, low: float, high: float) -> Tensor:
    """A float32 [size], uniform."""
    return torch.empty(size).uniform_(low, high)


def draw_weight(outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """[outputs, inputs], normal, of a size that keeps activations near 1."""
    weight = torch.empty(outputs, inputs)  # the audit describes thousands without values, on the meta device
    return (weight if weight.is_meta else weight.normal_() * max(inputs, 1) ** -0.5).to(dtype)


def _mlp(channels: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (
        draw_weight(hidden, channels, dtype),
        draw_vector(hidden, 0.5, 1.5),
        draw_vector(hidden, -0.5, 0.5),
        draw_weight(channels, hidden, dtype),
        draw_vector(channels, 0.2, 0.8),
        draw_vector(channels, -0.2, 0.2),
    )


def pool_mixer_case(x: Tensor) -> Case:
    """`ops.pool_mixer` of x [B, C, H, W]."""
    return Case("pool_mixer", (x, draw_vector(x.shape[1], 0.2, 0.8)))


def conv_mlp_case(x: Tensor, hidden: int, activation: str = "gelu") -> Case:
    """`ops.conv_mlp` of x [B, C, H, W]."""
    return Case("conv_mlp", (x, *_mlp(x.shape[1], hidden, x.dtype)), {"activation": activation})


def conv_norm_case(x: Tensor, outputs: int, activation: str | None = None, dtype: torch.dtype | None = None) -> Case:
    """`ops.conv_norm` of x [B, C, H, W], floating, or uint8 with weights in `dtype`."""
    channels, kind = x.shape[1], dtype or x.dtype
    weight = draw_weight(outputs, 9 * channels, kind).reshape(outputs, 3, 3, channels).permute(0, 3, 1, 2)
    scale, shift = draw_vector(outputs, 0.5, 1.5), draw_vector(outputs, -0.2, 0.2)
    options: dict[str, Any] = {"activation": activation}
    if x.dtype == torch.uint8:
        scale = scale / 60  # about what pixels deviate from their mean
        options["border"] = draw_vector(channels, -20.0, 20.0).round()  # exact in every dtype
    return Case("conv_norm", (x, weight, scale, shift), options)


def meta4d_case(x: Tensor, hidden: int, activation: str = "gelu") -> Case:
    """`ops.meta4d` of x [B, C, H, W]."""
    channels = x.shape[1]
    arguments = (x, draw_vector(channels, 0.2, 0.8), *_mlp(channels, hidden, x.dtype))
    return Case("meta4d", arguments, {"activation": activation})


def meta4d_train_case(x: Tensor, hidden: int, activation: str = "gelu") -> Case:
    """`ops.meta4d_train` of x [B, C, H, W], with the batch's statistics and stochastic depth."""
    channels = x.shape[1]
    arguments = [x, draw_vector(channels, 0.2, 0.8)]
    for outputs, inputs in ((hidden, channels), (channels, hidden)):
        vectors = ((-0.2, 0.2), (0.5, 1.5), (-0.5, 0.5))  # bias, and the norm's weight and bias
        arguments += [draw_weight(outputs, inputs, x.dtype), *(draw_vector(outputs, *ends) for ends in vectors)]
    arguments.append(draw_vector(channels, 0.2, 0.8))
    keeps = (torch.rand(2, len(x)) < 0.7).float() / 0.7
    options = {"activation": activation, "eps1": 1e-5, "eps2": 1e-5}
    return Case("meta4d_train", (*arguments, *keeps), options)


def bias_attention_case(
    batch: int, tokens: int, dtype: torch.dtype, *, num_heads: int, key_dim: int, value_dim: int
) -> Case:
    """`ops.bias_attention` with scores of standard deviation 1 and a bias of the same."""
    qkv = torch.randn(batch, tokens, num_heads * (2 * key_dim + value_dim)).to(dtype)
    return Case(
        "bias_attention",
        (qkv, torch.randn(num_heads, tokens, tokens)),
        {"num_heads": num_heads, "key_dim": key_dim},
    )


def attention_mixer_case(x: Tensor, *, num_heads: int, key_dim: int, value_dim: int) -> Case:
    """`ops.attention_mixer` of x [B, N, C]."""
    tokens, channels = x.shape[1:]
    qkv, values = num_heads * (2 * key_dim + value_dim), num_heads * value_dim
    arguments = (
        x,
        draw_vector(channels, 0.5, 1.5),
        draw_vector(channels, -0.2, 0.2),
        draw_weight(qkv, channels, x.dtype),
        draw_vector(qkv, -0.2, 0.2),
        torch.randn(num_heads, tokens, tokens),
        draw_weight(channels, values, x.dtype),
        draw_vector(channels, 0.2, 0.8),
        draw_vector(channels, -0.2, 0.2),
    )
    return Case("attention_mixer", arguments, {"num_heads": num_heads, "key_dim": key_dim, "eps": 1e-5})


def linear_mlp_case(x: Tensor, hidden: int, activation: str = "gelu") -> Case:
    """`ops.linear_mlp` of x [B, N, C]."""
    channels = x.shape[2]
    weight1, _, shift1, weight2, scale2, shift2 = _mlp(channels, hidden, x.dtype)
    norm = draw_vector(channels, 0.5, 1.5), draw_vector(channels, -0.2, 0.2)
    arguments = (x, *norm, weight1, shift1, weight2, scale2, shift2)
    return Case("linear_mlp", arguments, {"activation": activation, "eps": 1e-5})


def head_case(x: Tensor, classes: int | None = None) -> Case:
    """`ops.head` of x [B, N, C]; the pooled features where `classes` is None."""
    channels = x.shape[2]
    norm = draw_vector(channels, 0.5, 1.5), draw_vector(channels, -0.2, 0.2)
    linear: tuple[Tensor, ...] = ()
    if classes is not None:
        linear = draw_weight(classes, channels, x.dtype), draw_vector(classes, -0.2, 0.2)
    return Case("head", (x, *norm, *linear), {"eps": 1e-5})


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give `model` random weights in place, so that no broken part goes unnoticed; returns `model`.

    Layer scales become 0.2 to 0.8: with their initial 1e-5 a broken block would hardly change the output.
    Normalisation weights become 0.5 to 1.5, with biases and running statistics to match, and bias tables normal.
    Linear and convolution weights keep activations near 1. The same seed gives the same values on any device.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(target: Tensor, low: float, high: float) -> None:
        target.copy_(
            torch.empty(target.shape, dtype=torch.float64, device="cpu").uniform_(low, high, generator=generator)
        )

    def normal(target: Tensor, std: float) -> None:
        target.copy_(torch.empty(target.shape, dtype=torch.float64, device="cpu").normal_(0, std, generator=generator))

    for module in model.modules():
        if isinstance(module, LayerScale):
            uniform(module.gamma, 0.2, 0.8)
        elif isinstance(module, Attention):
            normal(module.attention_biases, 1.0)
        elif isinstance(module, nn.PReLU):
            uniform(module.weight, 0.1, 0.4)
        elif isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
            uniform(module.weight, 0.5, 1.5)
            normal(module.bias, 0.2)
            if (
                isinstance(module, nn.BatchNorm2d)
                and module.running_mean is not None
                and module.running_var is not None
            ):
                normal(module.running_mean, 0.2)
                uniform(module.running_var, 0.5, 1.5)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            normal(module.weight, module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                normal(module.bias, 0.2)
    return model


@contextlib.contextmanager
def float32_as_such() -> Iterator[None]:
    """Turn off TF32, which PyTorch's convolutions use by default and whose errors are a thousand times larger."""
    with _fp32_precision("ieee"):
        yield


@contextlib.contextmanager
def with_tf32() -> Iterator[None]:
    """Turn on TF32, for convolutions and matrix products."""
    with _fp32_precision("tf32"):
        yield


@contextlib.contextmanager
def _fp32_precision(wanted: str) -> Iterator[None]:
    """Set PyTorch's flags, and its older switches, which then can be read as well: `allow_tf32`, `cudnn.flags()`.

    Afterwards they are as before, and can be read if they could before.
    """
    cudnn, tf32 = torch.backends.cudnn, wanted == "tf32"
    newer: tuple[Any, ...] = cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    precisions = [flag.fp32_precision for flag in newer]
    of_cudnn = _readable(lambda: cudnn.allow_tf32)
    of_matmul = _readable(torch.get_float32_matmul_precision)
    try:
        cudnn.allow_tf32 = tf32  # older switches agree with the newer flags for as long as they are set together
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        for flag in newer:
            if flag.fp32_precision != wanted:  # "none" takes a setting of all backends
                flag.fp32_precision = wanted
        yield
    finally:
        if of_cudnn is not None:
            cudnn.allow_tf32 = of_cudnn
        if of_matmul is not None:
            torch.set_float32_matmul_precision(of_matmul)
        for flag, precision in zip(newer, precisions, strict=True):
            if flag.fp32_precision != precision:
                flag.fp32_precision = precision


def _readable(read: Callable[[], Any]) -> Any:
    """The result of `read`; None where newer flags were set, and PyTorch refuses to read the older ones."""
    try:
        return read()
    except RuntimeError:
        return None


@contextlib.contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Fill new tensors with NaN, and have PyTorch's own operations give the same bits each time."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        # NumPy warns where the interpreter meets the NaN of a masked element.
        warnings.filterwarnings("ignore", ".*encountered", RuntimeWarning, "triton")
        try:
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
