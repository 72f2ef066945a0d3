"""A network in eval mode as a list of fused operations with their arguments, for `freeze` and `export`.

BatchNorm, convolution biases and layer scales are folded into scales and shifts, in float64; both heads become one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .. import ops, reference
from ..model.blocks import Stem
from ..model.end import NO_POOLED_END, End
from ..model.fusion import replaces, why_other
from ..model.network import EfficientFormer
from ..model.stage import Stage
from ..model.steps import Step, attention_sides, run_steps
from ..model.wrappers import why_other_tensors
from ..reference import PIXEL_OFFSET

if TYPE_CHECKING:
    from ..kernels.plan import Plan

OUTPUTS = ("logits", "pooled", "features")


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
        found = []
        for step, sides in attention_sides(self.steps, height, width):
            assert step.table is not None
            bias = ops.expand_bias(step.table, *sides, **step.resize)
            if backend == "triton":
                bias = ops.prepare_bias(bias, **step.head_sizes, dtype=self.dtype)
            found.append(bias.contiguous())
        return found

    def run(
        self, x: Tensor, biases: Sequence[Tensor], backend: str, *, prepared: bool | None = None
    ) -> Tensor | list[Tensor]:
        """The result for images x [B, in_chans, H, W], normalised or uint8; `biases` are theirs, for this backend.

        `prepared`: whether the biases are as `ops.prepare_bias` returns them, by default for "triton" alone.
        """

        def call(operation: str, x: Tensor, tensors: Sequence[Tensor], options: Mapping[str, Any]) -> Tensor:
            if operation == "conv_norm":
                weight, scale, shift, *border = tensors
                options = {**options, "border": border[0] if border else None}
                tensors = weight, scale, shift
            result: Tensor = getattr(ops, operation)(x, *tensors, **options, backend=backend)
            return result

        return run_steps(
            self.steps_for(x), x, biases, call, prepared=backend == "triton" if prepared is None else prepared
        )

    def plan(self, x: Tensor, biases: Sequence[Tensor]) -> Plan | None:
        """The launches for images like x, `biases` being theirs; None where more than launches is needed."""
        from ..kernels.fold import Parameters
        from ..kernels.operators import call
        from ..kernels.plan import NotPlannableError, Plan

        tensors = [*self.tensors(), *biases]
        parameters = Parameters(tensors, self.dtype)
        steps = self.holding(parameters.keep(tensor) for tensor in self.tensors()).steps_for(x)
        kept = [parameters.keep(bias) for bias in biases]
        try:
            return Plan(lambda x: run_steps(steps, x, kept, call, prepared=True), x, parameters, tensors)
        except NotPlannableError:
            return None

    def steps_for(self, x: Tensor) -> list[Step]:
        """The steps for images of x's dtype."""
        if x.dtype != torch.uint8:
            return self.steps
        assert self.pixels is not None
        return [self.pixels, *self.steps[1:]]


def _structure(packed: Packed) -> list[Any]:
    steps = packed.steps if packed.pixels is None else [*packed.steps, packed.pixels]
    return [
        (step.operation, step.options, step.resize, [(t.shape, t.dtype) for t in step.all_tensors()]) for step in steps
    ]


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter; a ValueError where it has none."""
    weight = next(model.parameters(), None)
    if weight is None:
        raise ValueError("model: got one without parameters, allowed is a model as built by `create_model`")
    return weight.device


def pack(
    model: EfficientFormer,
    dtype: torch.dtype,
    output: str,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    deterministic: bool = True,
    stages: Sequence[int] | None = None,
) -> Packed:
    """The steps of `model` in `dtype`; with `mean` and `std`, for uint8 images as well.

    The features are the maps of `stages`, by default of all.

    Raises:
        ValueError: for a model in training mode, or with parts that the fused operations do not compute; for an output
            that it does not have.
    """
    wanted = range(len(model.stages)) if stages is None else stages
    _check(model, output, wanted)
    return _Packer(model, dtype, output, deterministic, wanted).packed(mean, std)


@dataclass
class _Exact:
    """Makes a network's own arguments: folded in float64, then in the operations' dtype; all are copies."""

    dtype: torch.dtype

    def own(self, tensor: Tensor, *, vector: bool = False) -> Tensor:
        accumulation = torch.float64 if self.dtype == torch.float64 else torch.float32
        kind = accumulation if vector or tensor.ndim == 1 else self.dtype
        layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        return torch.empty_like(tensor, dtype=kind, memory_format=layout).copy_(tensor.detach())

    def fold_batch_norm(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        exact: list[Any] = [one.double() if isinstance(one, Tensor) else one for one in arguments]
        return reference.fold_batch_norm(*exact)

    def fold_layer_scale(self, bias: Tensor, layer_scale: Tensor) -> tuple[Tensor, Tensor]:
        return reference.fold_layer_scale(bias.double(), layer_scale.double())

    def upcast(self, x: Tensor) -> Tensor:
        return x

    def mean(self, one: Tensor, other: Tensor) -> Tensor:
        return (one.double() + other.double()) / 2

    def table(self, table: Tensor) -> Tensor:
        return self.own(table, vector=True)


@dataclass
class _Packer:
    model: EfficientFormer
    dtype: torch.dtype
    output: str
    deterministic: bool
    wanted: Sequence[int]

    @torch.no_grad()
    def packed(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> Packed:
        model, source = self.model, _Exact(self.dtype)
        pixels = None
        if mean is not None and std is not None:
            weight, scale, shift = model.stem.folded(source)[0]
            exact = weight.double(), scale, shift
            tensors = _for_pixels(exact, scale.new_tensor(mean), scale.new_tensor(std), self.dtype)
            pixels = Step.of(source, "conv_norm", *tensors, activation="relu")
        steps = list(model.stem.steps(source))
        for index, stage in enumerate(cast("Iterable[Stage]", model.stages)):
            steps += stage.steps(source)
            steps += self.feature(index, source)
        if self.output != "features":
            steps += End(model).steps(source, pooled=self.output == "pooled")
        for step in steps:
            if step.operation in ("meta4d", "linear_mlp"):
                step.options["deterministic"] = self.deterministic
        return Packed(self.dtype, steps, pixels)

    def feature(self, stage: int, source: _Exact) -> Iterator[Step]:
        """The norm of a stage's output, and its return to the caller."""
        wanted, kind = self.output == "features" and stage in self.wanted, self.model.config.feature_norm
        if kind == "inline" or (kind == "tap" and wanted):
            norm = cast("nn.GroupNorm", self.model.feature_norms[stage])
            options = {"eps": norm.eps, "inline": kind == "inline", "wanted": wanted}
            yield Step.of(source, "group_norm", norm.weight, norm.bias, **options)
        elif wanted:
            yield Step("feature")


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


# --- which models can be packed ---------------------------------------------------------------------------------------


# A subclass may add methods, but not replace these.
_COMPUTING = (
    "__call__", "forward", "forward_features", "forward_head", "forward_intermediates", "logits", "_run_stages"
)  # fmt: skip


def _check(model: EfficientFormer, output: str, wanted: Sequence[int]) -> None:
    if model.training:
        raise ValueError("model: got one in training mode, allowed is one in eval mode: call model.eval()")
    allowed = "allowed is a model as built by `create_model`, in eval mode"
    if reason := why_other_tensors(model):
        raise ValueError(f"model: {reason}; {allowed}")
    for name, module, kinds in _parts(model, wanted):
        if reason := why_other(module, kinds):
            raise ValueError(f"model: {name}: {reason}; {allowed}")
    if output == "features":
        return
    end = End(model)
    if reason := end.why_not_pooled():
        if reason == NO_POOLED_END:
            raise ValueError(f"output: got {output!r}, allowed is 'features' for a model without the pooled end")
        raise ValueError(f"model: {reason}; {allowed}")
    if output == "logits":
        if model.num_classes == 0:
            raise ValueError("output: got 'logits', allowed are 'pooled' and 'features' for a model without heads")
        if reason := end.why_no_logits():
            raise ValueError(f"model: {reason}; {allowed}")


def _parts(
    model: EfficientFormer, wanted: Sequence[int]
) -> Iterator[tuple[str, nn.Module, tuple[type[nn.Module], ...]]]:
    """Name, module, and its allowed classes; outer modules come before inner ones."""
    same = not replaces(model, EfficientFormer, *_COMPUTING)
    yield "the model", model, (type(model) if same else EfficientFormer,)
    yield "stem", model.stem, (Stem,)
    for index, stage in enumerate(cast("Iterable[Stage]", model.stages)):
        yield f"stages.{index}", stage, (Stage,)
        for name, module, kinds in stage.parts():
            yield f"stages.{index}.{name}", module, kinds
    if model.config.feature_norm is not None:
        for index, norm in enumerate(model.feature_norms):
            if model.config.feature_norm == "inline" or index in wanted:
                yield f"feature_norms.{index}", norm, (nn.GroupNorm,)
