"""Parts of a network in eval mode as steps: fused operations with their arguments.

`freeze` and `export` run the steps of a whole network on tensors of their own; a live network runs those of its stem,
of each stage and of its end on the parameters of the moment. Each part makes its steps from a `Source` of arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..workload import halved

# Places in the arguments of `ops.attention_mixer`, counted without x. The bias depends on the image size.
QKV_WEIGHT, BIAS = 2, 4


class Fold(Protocol):
    """Turns parameters of modules into scales and shifts, as these functions of `effformer.ops` do."""

    def fold_batch_norm(
        self,
        conv_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        layer_scale: Tensor | None = None,
        /,
    ) -> tuple[Tensor, Tensor]: ...

    def fold_layer_scale(self, bias: Tensor, layer_scale: Tensor, /) -> tuple[Tensor, Tensor]: ...

    def upcast(self, x: Tensor, /) -> Tensor: ...


class Source(Fold, Protocol):
    """Turns parameters into arguments of the fused operations."""

    def own(self, tensor: Tensor, /) -> Tensor:
        """A parameter, or what another method returned, in the operations' dtype and layout."""

    def mean(self, one: Tensor, other: Tensor, /) -> Tensor:
        """(one + other) / 2."""

    def table(self, table: Tensor, /) -> Tensor:
        """The table of an attention bias, as the source expands it."""


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

    @classmethod
    def of(cls, source: Source, operation: str, *tensors: Tensor, **options: Any) -> Step:
        """A step with the source's own tensors."""
        return cls(operation, tuple(source.own(tensor) for tensor in tensors), options)

    @property
    def head_sizes(self) -> dict[str, int]:
        """key_dim and value_dim of `attention_mixer`."""
        heads, key_dim = self.options["num_heads"], self.options["key_dim"]
        return {"key_dim": key_dim, "value_dim": self.tensors[QKV_WEIGHT].shape[0] // heads - 2 * key_dim}


def attention_sides(steps: Iterable[Step], height: int, width: int) -> Iterator[tuple[Step, tuple[int, int]]]:
    """The attention steps, each with the sides of its map, for a first map of [height, width]."""
    sides = height, width
    for one in steps:
        if one.operation == "conv_norm":
            sides = halved(sides[0]), halved(sides[1])
        elif one.table is not None:
            yield one, sides


Call = Callable[[str, Tensor, Sequence[Tensor], Mapping[str, Any]], Tensor]  # of an operation on x


def run_steps(
    steps: Sequence[Step], x: Tensor, biases: Sequence[Tensor], call: Call, *, prepared: bool
) -> Tensor | list[Tensor]:
    """The result for x, or the features if steps return any.

    Args:
        steps: of consecutive parts.
        x: images or a map [B, C, H, W], or tokens [B, N, C].
        biases: of the attention steps in order, for x's sides.
        call: runs an operation.
        prepared: whether the biases are as `ops.prepare_bias` returns them.
    """
    features: list[Tensor] = []
    sides = x.shape[2:]
    remaining = iter(biases)
    for one in steps:
        match one.operation:
            case "tokens":
                x = x.flatten(2).transpose(1, 2)
            case "attention_mixer":
                tensors = *one.tensors[:BIAS], next(remaining), *one.tensors[BIAS:]
                x = call(one.operation, x, tensors, one.options | {"prepared": prepared})
            case "group_norm":
                maps = x if x.ndim == 4 else to_map(x, sides[0], sides[1])
                weight, bias = (vector.to(x.dtype) for vector in one.tensors)
                maps = F.group_norm(maps, 1, weight, bias, one.options["eps"])
                maps = maps.contiguous(memory_format=torch.channels_last)  # which it is not on a GPU
                if one.options["inline"]:
                    x = maps if x.ndim == 4 else maps.flatten(2).transpose(1, 2)
                    features += [maps] * one.options["wanted"]
                else:
                    features.append(maps)
            case "feature":
                features.append(x if x.ndim == 4 else to_map(x, sides[0], sides[1]))
            case _:
                x = call(one.operation, x, one.tensors, one.options)
        sides = x.shape[2:] if x.ndim == 4 else sides
    return features or x


def to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, N, C] -> [B, C, height, width]."""
    channels_first = tokens.transpose(1, 2)
    return channels_first.reshape(channels_first.shape[0], channels_first.shape[1], height, width)
