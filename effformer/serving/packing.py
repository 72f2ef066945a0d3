"""A network in eval mode as a list of fused operations with their arguments, for `freeze` and `export`.

BatchNorm, convolution biases and layer scales are folded into scales and shifts, in float64; both heads become one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..model.blocks import Downsample, Flat, Meta3D, Meta4D, Stem
from ..model.fusion import is_active, is_plain
from ..model.network import EfficientFormer, to_map
from ..model.stage import Stage
from ..reference import PIXEL_OFFSET
from ..workload import halved

OUTPUTS = ("logits", "pooled", "features")

_Module = TypeVar("_Module", bound=nn.Module)

# Places in the arguments of `ops.attention_mixer`, counted without x. The bias depends on the image size.
_QKV_WEIGHT, _BIAS = 2, 4


@dataclass
class Step:
    """`ops.<operation>(x, *tensors, **options)`, or "tokens" (map to tokens) or "feature" (a map is returned).

    Attributes:
        tensors: matrices and filters in the network's dtype, vectors in float32 (float64 for float64); the last of
            the first convolution for pixels is its border.
        table: of `attention_mixer`, whose bias is expanded from it by `expand_bias(table, height, width, **resize)`.
    """

    operation: str
    tensors: tuple[Tensor, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    table: Tensor | None = None
    resize: dict[str, Any] = field(default_factory=dict)

    def all_tensors(self) -> tuple[Tensor, ...]:
        return self.tensors if self.table is None else (*self.tensors, self.table)


@dataclass
class Packed:
    """The steps of a network.

    Attributes:
        dtype: of images and results.
        steps: in order; the first is the stem's first convolution, on normalised images.
        pixels: the same convolution on uint8 images, mean and std folded in; None where there are none.
    """

    dtype: torch.dtype
    steps: list[Step]
    pixels: Step | None

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that `run` reads, in an order that depends on the architecture alone."""
        for step in self.steps if self.pixels is None else [*self.steps, self.pixels]:
            yield from step.all_tensors()

    def holding(self, tensors: Iterable[Tensor]) -> Packed:
        """The same steps with other tensors, given in the order of `tensors`."""
        remaining = iter(tensors)

        def replaced(step: Step) -> Step:
            own = tuple(next(remaining) for _ in step.tensors)
            return replace(step, tensors=own, table=None if step.table is None else next(remaining))

        steps = [replaced(step) for step in self.steps]
        return Packed(self.dtype, steps, None if self.pixels is None else replaced(self.pixels))

    def take(self, other: Packed) -> None:
        """Copy the tensors of the same network with other weights, on any device, into this one's, in place.

        Raises:
            ValueError: for another architecture.
        """
        if _structure(self) != _structure(other):
            raise ValueError("model: got another architecture, allowed is that of the frozen model")
        for target, source in zip(self.tensors(), other.tensors(), strict=True):
            target.copy_(source)

    def biases(self, height: int, width: int, backend: str) -> list[Tensor]:
        """The attention bias of each 3D block for images of these sides, as `run` takes them."""
        sides = height, width
        for step in self.steps:
            if step.operation == "conv_norm":
                sides = halved(sides[0]), halved(sides[1])
        found = []
        for step in self.steps:
            if step.table is not None:
                bias = ops.expand_bias(step.table, *sides, **step.resize)
                if backend == "triton":
                    heads, key_dim = step.options["num_heads"], step.options["key_dim"]
                    value_dim = step.tensors[_QKV_WEIGHT].shape[0] // heads - 2 * key_dim
                    bias = ops.prepare_bias(bias, key_dim=key_dim, value_dim=value_dim, dtype=self.dtype)
                found.append(bias.contiguous())
        return found

    def run(
        self, x: Tensor, biases: Sequence[Tensor], backend: str, *, prepared: bool | None = None
    ) -> Tensor | list[Tensor]:
        """The result for images x [B, in_chans, H, W], normalised or uint8; `biases` are theirs, for this backend.

        `prepared`: whether the biases are as `ops.prepare_bias` returns them, by default for "triton" alone.
        """
        features: list[Tensor] = []
        sides = x.shape[2], x.shape[3]
        remaining = iter(biases)
        prepared = backend == "triton" if prepared is None else prepared
        for step in self.steps:
            if step is self.steps[0] and x.dtype == torch.uint8:
                assert self.pixels is not None
                step = self.pixels
            match step.operation:
                case "conv_norm":
                    border = step.tensors[3] if step is self.pixels else None
                    x = ops.conv_norm(x, *step.tensors[:3], border=border, **step.options, backend=backend)
                    sides = x.shape[2], x.shape[3]
                case "meta4d":
                    x = ops.meta4d(x, *step.tensors, **step.options, backend=backend)
                case "tokens":
                    x = x.flatten(2).transpose(1, 2)
                case "attention_mixer":
                    arguments = *step.tensors[:_BIAS], next(remaining), *step.tensors[_BIAS:]
                    x = ops.attention_mixer(x, *arguments, **step.options, prepared=prepared, backend=backend)
                case "linear_mlp":
                    x = ops.linear_mlp(x, *step.tensors, **step.options, backend=backend)
                case "head":
                    x = ops.head(x, *step.tensors, **step.options, backend=backend)
                case "group_norm":
                    maps = x if x.ndim == 4 else to_map(x, *sides)
                    weight, bias = (vector.to(x.dtype) for vector in step.tensors)
                    maps = F.group_norm(maps, 1, weight, bias, step.options["eps"])
                    maps = maps.contiguous(memory_format=torch.channels_last)  # which it is not on a GPU
                    if step.options["inline"]:
                        x = maps if x.ndim == 4 else maps.flatten(2).transpose(1, 2)
                        features += [maps] * step.options["wanted"]
                    else:
                        features.append(maps)
                case "feature":
                    features.append(x if x.ndim == 4 else to_map(x, *sides))
        return features or x


def _structure(packed: Packed) -> list[Any]:
    steps = packed.steps if packed.pixels is None else [*packed.steps, packed.pixels]
    return [
        (step.operation, step.options, step.resize, [(t.shape, t.dtype) for t in step.all_tensors()]) for step in steps
    ]


def pack(
    model: EfficientFormer,
    dtype: torch.dtype,
    output: str,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    deterministic: bool = True,
) -> Packed:
    """The steps of `model` in `dtype`; with `mean` and `std`, for uint8 images as well.

    Raises:
        ValueError: for a model in training mode, or with parts that the fused operations do not compute; for an output
            that it does not have.
    """
    _check(model, output)
    return _Packer(model, dtype, output, deterministic).packed(mean, std)


@dataclass
class _Packer:
    model: EfficientFormer
    dtype: torch.dtype
    output: str
    deterministic: bool

    def packed(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> Packed:
        model = self.model
        first, second = _exact(model.stem).folded()
        pixels = None
        if mean is not None and std is not None:
            tensors = _for_pixels(first, first[0].new_tensor(mean), first[0].new_tensor(std), self.dtype)
            pixels = self.step("conv_norm", *tensors, activation="relu")
        steps = [self.step("conv_norm", *conv, activation="relu") for conv in (first, second)]
        for index, stage in enumerate(cast("Iterable[Stage]", model.stages)):
            if isinstance(stage.downsample, Downsample):
                steps.append(self.step("conv_norm", *_exact(stage.downsample).folded()))
            for block in stage.blocks:
                steps += self.block(_exact(block))
            steps += self.feature(index)
        if self.output != "features":
            steps.append(self.end())
        return Packed(self.dtype, steps, pixels)

    def step(self, operation: str, *tensors: Tensor, **options: Any) -> Step:
        return Step(operation, tuple(self.own(tensor) for tensor in tensors), options)

    def own(self, tensor: Tensor, *, vector: bool = False) -> Tensor:
        """Convert a tensor to the operations' dtype and layout; it is a copy already, see `_exact`."""
        accumulation = torch.float64 if self.dtype == torch.float64 else torch.float32
        kind = accumulation if vector or tensor.ndim == 1 else self.dtype
        layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        return tensor.detach().to(kind).contiguous(memory_format=layout)

    def block(self, block: nn.Module) -> Iterator[Step]:
        if isinstance(block, Flat):
            yield Step("tokens")
            return
        assert isinstance(block, Meta4D | Meta3D)
        options: dict[str, Any] = {"activation": block.activation, "deterministic": self.deterministic}
        if isinstance(block, Meta4D):
            yield self.step("meta4d", *block.folded(), **options)
            return
        mixer = block.token_mixer
        tensors = list(block.folded_mixer(mixer.attention_biases))
        table = tensors.pop(_BIAS)
        heads = {"num_heads": mixer.num_heads, "key_dim": mixer.key_dim, "eps": block.norm1.eps}
        found = self.step("attention_mixer", *tensors, **heads)
        found.table = self.own(table, vector=True)
        found.resize = {"resolution": mixer.resolution, "resize": mixer.bias_resize}
        yield found
        yield self.step("linear_mlp", *block.folded_mlp(), eps=block.norm2.eps, **options)

    def feature(self, stage: int) -> Iterator[Step]:
        """The norm of a stage's output, and its return to the caller."""
        wanted, kind = self.output == "features", self.model.config.feature_norm
        if kind == "inline" or (kind == "tap" and wanted):
            norm = cast("nn.GroupNorm", _exact(self.model.feature_norms[stage]))
            yield self.step("group_norm", norm.weight, norm.bias, eps=norm.eps, inline=kind == "inline", wanted=wanted)
        elif wanted:
            yield Step("feature")

    def end(self) -> Step:
        """Final norm, pooling and, for logits, one head with the mean of both heads' weights and biases."""
        norm = cast("nn.LayerNorm", _exact(self.model.norm))
        if self.output == "pooled":
            return self.step("head", norm.weight, norm.bias, eps=norm.eps)
        one, other = (cast("nn.Linear", _exact(head)) for head in self.model.get_classifier())
        weight, bias = (one.weight + other.weight) / 2, (one.bias + other.bias) / 2
        return self.step("head", norm.weight, norm.bias, weight, bias, eps=norm.eps)


def normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and std as numbers, None where both are; a ValueError names the wrong one."""
    if mean is None and std is None:
        return None
    found = []
    for name, values, allowed in (("mean", mean, "0 to 1"), ("std", std, "more than 0")):
        try:
            numbers = tuple(float(value) for value in (() if values is None else values))
        except (TypeError, ValueError):  # not a sequence, or not of numbers
            numbers = ()
        if len(numbers) != channels or not all(0 <= v <= 1 if name == "mean" else 0 < v < math.inf for v in numbers):
            raise ValueError(f"{name}: got {values}, allowed are {channels} numbers, {allowed}, beside the other")
        found.append(numbers)
    return found[0], found[1]


def _for_pixels(
    conv: tuple[Tensor, Tensor, Tensor], mean: Tensor, std: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weight, scale, shift, border) for pixels - PIXEL_OFFSET instead of (pixels / 255 - mean) / std.

    Padding is 0 in normalised images: in pixels it is the mean, which becomes the border.
    """
    weight, scale, shift = conv
    middle = std.mean()  # weights keep their size this way; the scale takes the rest
    weight = (weight * (middle / std)[:, None, None]).to(dtype).double()  # rounded, so that the shift corrects for it
    border = 255 * mean - PIXEL_OFFSET
    scale = scale / (255 * middle)
    return weight, scale, shift - scale * (weight.sum((2, 3)) @ border), border


def _exact(module: _Module) -> _Module:
    """A float64 copy."""
    return copy.deepcopy(module).double()


# --- which models can be packed ---------------------------------------------------------------------------------------


# A subclass may add methods, but not replace these.
_COMPUTING = (
    "__call__", "forward", "forward_features", "forward_head", "forward_intermediates", "logits", "_run_stages"
)  # fmt: skip


def _check(model: EfficientFormer, output: str) -> None:
    if model.training:
        raise ValueError("model: got one in training mode, allowed is one in eval mode: call model.eval()")
    for name, module, kinds in _parts(model):
        if reason := _why_not(module, kinds):
            raise ValueError(f"model: {name}: {reason}; allowed is a model as built by `create_model`, in eval mode")
    if output == "features":
        return
    complete = len(model.stages) == model.num_stages and is_plain(model.norm, (nn.LayerNorm,))
    if not complete or model.global_pool != "avg":
        raise ValueError(f"output: got {output!r}, allowed is 'features' for a model without the pooled end")
    if not is_plain(model.head_drop, (nn.Dropout,)) or is_active(model.head_drop):
        reason = "it was replaced, has hooks or is active"
        raise ValueError(f"model: head_drop: {reason}; allowed is a model as built by `create_model`, in eval mode")
    if output == "logits":
        heads = model.head, model.head_dist
        if model.num_classes == 0:
            raise ValueError("output: got 'logits', allowed are 'pooled' and 'features' for a model without heads")
        if not all(is_plain(head, (nn.Linear,)) for head in heads):
            raise ValueError(
                "model: a head was replaced, changed or has hooks; allowed is a model as built by `create_model`"
            )


def _parts(model: EfficientFormer) -> Iterator[tuple[str, nn.Module, tuple[type[nn.Module], ...]]]:
    """Name, module, and its allowed classes; outer modules come before inner ones."""
    kind = type(model)
    same = all(getattr(kind, method) is getattr(EfficientFormer, method) for method in _COMPUTING)
    yield "the model", model, (kind if same else EfficientFormer,)
    yield "stem", model.stem, (Stem,)
    for index, stage in enumerate(cast("Iterable[Stage]", model.stages)):
        yield f"stages.{index}", stage, (Stage,)
        yield f"stages.{index}.downsample", stage.downsample, (Downsample, nn.Identity)
        for number, block in enumerate(stage.blocks):
            yield f"stages.{index}.blocks.{number}", block, (Meta4D, Meta3D, Flat)
    if model.config.feature_norm is not None:
        for index, norm in enumerate(model.feature_norms):
            yield f"feature_norms.{index}", norm, (nn.GroupNorm,)


def _why_not(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> str | None:
    """The reason why the steps would not compute the same as `module`; None if they do."""
    if not is_plain(module, kinds):
        return "it was replaced, changed or has hooks"
    match module:
        case Meta4D() | Meta3D():
            return module.why_composed()
        case Stem():
            # A Sequential calls all its modules, in their order.
            if tuple(module._modules) != ("conv1", "norm1", "act1", "conv2", "norm2", "act2"):
                return "modules were added, removed or moved"
            pairs = [(module.conv1, module.norm1), (module.conv2, module.norm2)]
            for name, relu in (("act1", module.act1), ("act2", module.act2)):
                if not is_plain(relu, (nn.ReLU,)):
                    return f"submodule {name!r} was replaced, changed or has hooks"
        case Downsample():
            pairs = [(module.conv, module.norm)]
        case _:
            return None
    if any(not _is_halving(conv) or not is_plain(norm, (nn.BatchNorm2d,)) for conv, norm in pairs):
        return "a convolution or its norm was replaced, changed or has hooks"
    if any(norm.training or norm.running_mean is None for _, norm in pairs):
        return "BatchNorm uses batch statistics"
    return None


def _is_halving(conv: nn.Module) -> bool:
    """Whether `conv` is a plain 3x3 convolution of stride 2."""
    if type(conv) is not nn.Conv2d or not is_plain(conv, (nn.Conv2d,), expected=lambda _: True):
        return False
    geometry = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
    return geometry == ((3, 3), (2, 2), (1, 1), (1, 1), 1, "zeros")
