"""`explain`: which way each part of a network computes, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..backend import products_dtype, why_eager
from ..checks import shape_of
from ..model.blocks import Flat, Meta3D, Meta4D, Stem
from ..model.end import End
from ..model.fusion import Fusable
from ..model.live import decide
from ..model.netspresso import Backbone, network_within
from ..model.network import EfficientFormer
from ..model.stage import Stage
from ..workload import halved

Path = Literal["plan", "kernels", "eager", "modules", "raises"]


@dataclass(frozen=True)
class PartPath:
    """How a part of a network computes.

    Attributes:
        part: "stem", "stages.0" to "stages.3", their parts where they compute one by one, and "end".
        path: "plan", the kernels of the whole part at once; "kernels", those of one block; "eager", the fused
            operations in plain PyTorch; "modules", its modules; "raises", an UnsupportedError by backend="triton".
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

    Nothing is computed, and no hook is called; plans that a forward would make are made.

    Args:
        model: an `EfficientFormer` or a `Backbone`.
        images: [B, in_chans, H, W] in the model's dtype (any floating one under autocast), on its device.

    Raises:
        TypeError, ValueError: for another model, or images of another shape.
    """
    network = network_within(model)
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != network.in_chans:
        got = shape_of(images) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images: got {got}, allowed is a tensor [B, {network.in_chans}, H, W]")
    return Explanation(tuple(_parts(network, images)))


def _parts(network: EfficientFormer, images: Tensor) -> Iterator[PartPath]:
    yield _whole("stem", network.stem, images)
    dtype = products_dtype(images)
    sides = (images.shape[2] + 3) // 4, (images.shape[3] + 3) // 4
    x = _map(images, network.config.widths[0], sides, dtype)
    for index, stage in enumerate(network.stages):
        name, before = f"stages.{index}", sides
        sides = before if index == 0 else (halved(before[0]), halved(before[1]))
        found = _whole(name, stage, x)
        if found.path == "plan" or not isinstance(stage, Stage):
            yield found
        else:
            yield from _blocks(name, stage, x, sides, found.why)
        x = _map(images, network.config.widths[index], sides, dtype)
    yield _whole("end", End(network), x.flatten(2).transpose(1, 2))


def _whole(name: str, part: object, x: Tensor) -> PartPath:
    """Planned, or by its modules."""
    if not isinstance(part, Stem | Stage | End):
        return PartPath(name, "modules", f"its class is {type(part).__name__}", None)
    decision = decide(part, x)
    if isinstance(decision, str):
        return PartPath(name, "modules", decision, None)
    return PartPath(name, "plan", None, tuple(decision.plan.kernels))


def _blocks(name: str, stage: Stage, x: Tensor, sides: tuple[int, int], reason: str | None) -> Iterator[PartPath]:
    """Of a stage that is not planned as a whole, for this reason."""
    if not isinstance(stage.downsample, nn.Identity):
        yield PartPath(f"{name}.downsample", "modules", reason, None)
        x = _map(x, stage.width, sides, x.dtype)
    for index, block in enumerate(stage.blocks):
        if isinstance(block, Flat):
            x = x.flatten(2).transpose(1, 2)
        elif isinstance(block, Meta4D | Meta3D):
            arguments = (x, *sides) if isinstance(block, Meta3D) else (x,)
            yield _block(f"{name}.blocks.{index}", block, *arguments)
        else:
            yield PartPath(f"{name}.blocks.{index}", "modules", f"its class is {type(block).__name__}", None)


def _block(name: str, block: Fusable, x: Tensor, *sides: int) -> PartPath:
    from ..kernels.launch import recorded

    asked_for = block.backend == "triton"
    if reason := block.why_composed():
        return PartPath(name, "raises" if asked_for else "modules", reason, None)
    sizes: dict[str, Any] = {"norm": True, "key_dim": block.token_mixer.key_dim} if isinstance(block, Meta3D) else {}
    if reason := why_eager(block.backend, x, *block.parameters(), activation=block.activation, **sizes):
        return PartPath(name, "raises" if asked_for else "eager", reason, None)
    with torch.no_grad(), recorded(run=False) as launches:
        block.fused(x, *sides)
    return PartPath(
        name, "kernels", "its stage is not planned as a whole", tuple(one.kernel.__name__ for one in launches)
    )


def _map(like: Tensor, channels: int, sides: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """An empty map, as a part before would return it."""
    shape = (like.shape[0], channels, *sides)
    return torch.empty(shape, dtype=dtype, device=like.device).to(memory_format=torch.channels_last)
