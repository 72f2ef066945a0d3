"""`explain`: which way each part of a network computes, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..backend import needs_gradient, products_dtype, why_eager
from ..model.blocks import Attention, Flat, Meta3D, Stem
from ..model.end import End
from ..model.fusion import replaces
from ..model.live import decide
from ..model.meta4d import Meta4D
from ..model.netspresso import Backbone, network_within
from ..model.network import EfficientFormer, check_images
from ..model.stage import Stage
from ..workload import halved

Path = Literal["plan", "kernels", "eager", "modules", "raises"]


@dataclass(frozen=True)
class PartPath:
    """How a part of a network computes.

    Attributes:
        part: "stem", "stages.0" to "stages.3", their parts where they compute one by one, and "end".
        path: "plan", the kernels of the whole part at once; "kernels", those of one block, or of the attention in a
            block of modules; "eager", the fused operations in plain PyTorch; "modules", its modules; "raises", an
            UnsupportedError by backend="triton".
        why: the reason why the part takes no faster path; None for a plan.
        kernels: names of the kernels that it launches; None where PyTorch's operators compute.
    """

    part: str
    path: Path
    why: str | None
    kernels: tuple[str, ...] | None


@dataclass(frozen=True)
class Explanation:
    """The parts of a network in order; as a string, a table of them."""

    parts: tuple[PartPath, ...]

    @property
    def launches(self) -> int:
        """Launches of kernels in one forward, without those of PyTorch's operators."""
        return sum(len(part.kernels or ()) for part in self.parts)

    def __str__(self) -> str:
        width = max(len(part.part) for part in self.parts)
        lines = [f"{'part':<{width}}  path     launches  why"]
        for one in self.parts:
            count = "-" if one.kernels is None else str(len(one.kernels))
            lines.append(f"{one.part:<{width}}  {one.path:<7}  {count:>8}  {one.why or ''}".rstrip())
        others = any(one.kernels is None for one in self.parts)
        return "\n".join([*lines, f"{self.launches} launches" + (" beside PyTorch's operators" if others else "")])


def explain(model: EfficientFormer | Backbone, images: Tensor) -> Explanation:
    """Tell how `model` would compute on `images` now: its modes, hooks, backend, autocast and gradients count.

    No kernel is launched and no hook is called. Plans that a forward would make are made.

    Args:
        model: an `EfficientFormer` or a `Backbone`.
        images: [B, in_chans, H, W] in the model's dtype (any floating one under autocast), on its device.

    Raises:
        TypeError: for another model, or images in another dtype.
        ValueError: for images of another shape, or on another device.
    """
    network = network_within(model)
    if not isinstance(images, Tensor):
        raise TypeError(f"images: got {type(images).__name__}, allowed is a tensor")
    weight = next(network.parameters())
    check_images(images, network.in_chans, weight, "images")
    if images.device != weight.device:
        raise ValueError(f"images: got a tensor on {images.device}, allowed is the model's device {weight.device}")
    return Explanation(tuple(_parts(network, images)))


def _parts(network: EfficientFormer, images: Tensor) -> Iterator[PartPath]:
    yield _whole("stem", network.stem, images)
    dtype = products_dtype(images)
    sides = (images.shape[2] + 3) // 4, (images.shape[3] + 3) // 4
    x = _map(images, network.config.widths[0], sides, dtype, network.stem)
    for index, stage in enumerate(network.stages):
        name, before = f"stages.{index}", sides
        sides = before if index == 0 else (halved(before[0]), halved(before[1]))
        found = _whole(name, stage, x)
        if found.path == "plan" or not isinstance(stage, Stage):
            yield found
        else:
            yield from _blocks(name, stage, x, sides, found.why, network.config.value_dim)
        x = _map(x, network.config.widths[index], sides, dtype, stage)
    if replaces(network, EfficientFormer, "forward_features"):
        yield PartPath("end", "modules", "forward_features was replaced", None)
    else:
        yield _whole("end", End(network), x.flatten(2).transpose(1, 2))


def _whole(name: str, part: object, x: Tensor) -> PartPath:
    """Planned, or by its modules."""
    if not isinstance(part, Stem | Stage | End):
        return PartPath(name, "modules", f"its class is {type(part).__name__}", None)
    decision = decide(part, x)
    if isinstance(decision, str):
        return PartPath(name, "modules", decision, None)
    return PartPath(name, "plan", None, tuple(decision.plan.kernels))


def _blocks(
    name: str, stage: Stage, x: Tensor, sides: tuple[int, int], reason: str | None, value_dim: int
) -> Iterator[PartPath]:
    """Of a stage that is not planned as a whole, for this reason."""
    if not isinstance(stage.downsample, nn.Identity):
        yield PartPath(f"{name}.downsample", "modules", reason, None)
        x = _map(x, stage.width, sides, x.dtype, stage.downsample)
    for index, block in enumerate(stage.blocks):
        if isinstance(block, Flat):
            x = x.flatten(2).transpose(1, 2)
        elif isinstance(block, Meta4D | Meta3D):
            found = _block(f"{name}.blocks.{index}", block, x, *(sides if isinstance(block, Meta3D) else ()))
            yield found
            if found.path == "modules" and isinstance(mixer := getattr(block, "token_mixer", None), Attention):
                yield _block(f"{found.part}.token_mixer", mixer, *_attended(mixer, x, value_dim))
        else:
            yield PartPath(f"{name}.blocks.{index}", "modules", f"its class is {type(block).__name__}", None)
        x = x.detach().requires_grad_(_trained(x, block))


def _block(name: str, block: Meta4D | Meta3D | Attention, x: Tensor, *others: Any) -> PartPath:
    """A fused operation on its own, in a stage that is not planned as a whole."""
    asked_for = block.backend == "triton"
    mode = block.why_composed()
    in_training = mode is not None and asked_for and block.why_no_fused_training() is None
    if mode and not in_training:
        return PartPath(name, *(("raises", block.why_no_fused_training()) if asked_for else ("modules", mode)), None)
    options: dict[str, Any] = {"differentiable": True}
    if isinstance(block, Meta4D | Meta3D):
        options["activation"] = block.activation
    if isinstance(block, Meta3D | Attention):
        mixer = block.token_mixer if isinstance(block, Meta3D) else block
        options |= {"norm": isinstance(block, Meta3D), "key_dim": mixer.key_dim}
    if reason := why_eager(block.backend, x, *block.parameters(), **options):
        return PartPath(name, "raises" if asked_for else "eager", reason, None)
    from ..kernels.launch import described

    with torch.no_grad(), described() as launches:
        (block.describe_training if in_training else block.fused)(x, *others)
    kernels = tuple(one.kernel.__name__ for one in launches)
    gradients = _trained(x, block)
    if in_training:
        why = f"{mode}: kernels compute that" + (", and its gradients" if gradients else "")
    else:
        why = "kernels compute its gradients, too" if gradients else "its stage is not planned as a whole"
    return PartPath(name, "kernels", why, kernels)


def _attended(mixer: Attention, x: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    """Empty arguments of `Attention.attend` for tokens x."""
    batch, tokens, _ = x.shape
    channels = mixer.num_heads * (2 * mixer.key_dim + value_dim)  # of qkv, which may be another module
    qkv = torch.empty(batch, tokens, channels, dtype=x.dtype, device=x.device)
    return qkv, torch.empty(mixer.num_heads, tokens, tokens, dtype=torch.float32, device=x.device)


def _map(like: Tensor, channels: int, sides: tuple[int, int], dtype: torch.dtype, part: nn.Module) -> Tensor:
    """An empty map, as the part before would return it for an input `like` this."""
    shape = (like.shape[0], channels, *sides)
    x = torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)
    return x.requires_grad_(_trained(like, part))


def _trained(x: Tensor, part: nn.Module) -> bool:
    """Whether a part's result for x needs a gradient."""
    return needs_gradient(x, *part.parameters())
