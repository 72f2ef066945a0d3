"""The EfficientFormer network (arXiv 2206.01191): stem, four stages, two heads.

Public methods and state-dict keys are timm's, so that its checkpoints load with strict=True.
"""

# No `from __future__ import annotations`: an FX GraphModule with string annotations cannot be saved.

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, cast, overload

import torch
import torch.fx
from torch import Tensor, nn

from .. import ops
from ..backend import autocast
from ..checks import FINITE, PROBABILITY, as_int, check, check_choice, check_count, check_floating, shape_of
from ..config import EfficientFormerConfig
from . import live
from .blocks import Attention, Meta3D, Stem
from .end import End
from .fusion import replaces
from .meta4d import Meta4D
from .stage import Stage, StageOutput
from .steps import to_map
from .wrappers import class_of, is_efficientformer, remedy

POOLS = ("avg", "")


@torch.fx.wrap
def check_images(x: Tensor, in_chans: int, weight: Tensor, name: str = "x") -> Tensor:
    """Return `x` if it is a batch of images [B, in_chans, H, W] in the dtype of `weight`; FX records this as one node.

    Raises:
        TypeError: for a dtype that the network does not compute in (outside autocast).
        ValueError: for another shape.
    """
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        if x.ndim != 4 or x.shape[1] != in_chans:
            raise ValueError(f"{name}: got shape {shape_of(x)}, allowed is [B, {in_chans}, H, W]")
        check_floating(name, x)
        if x.dtype != weight.dtype and not autocast(x.device.type):
            raise TypeError(
                f"{name}: got {x.dtype}, allowed is the network's {weight.dtype} (any floating dtype in autocast)"
            )
    return x


@torch.fx.wrap
def mean_of_heads(head: Tensor, head_dist: Tensor) -> Tensor:
    """The mean of both heads' outputs, which are never broadcast; FX records this as one node.

    Raises:
        ValueError: for outputs of two shapes, as where one head was replaced.
    """
    if not torch.jit.is_scripting() and head.shape != head_dist.shape:  # type: ignore[attr-defined]
        raise ValueError(
            f"head, head_dist: got outputs of {shape_of(head)} and {shape_of(head_dist)}, allowed are two of one "
            "shape: replace both heads, or call reset_classifier(num_classes)"
        )
    return (head + head_dist) / 2


class EfficientFormer(nn.Module):
    """EfficientFormer with timm's interface: images [B, in_chans, H, W] -> logits [B, num_classes].

    H and W may be any size from 32 on; the images need not be square. All published models are distilled: the logits
    are the mean of both heads, except in training after `set_distilled_training()`.

    Args:
        config: the architecture.
        in_chans: channels of the images.
        num_classes: 0 for no heads.
        global_pool: "avg" or "" (tokens are not pooled).
        drop_rate: dropout before the heads.
        proj_drop_rate: timm's name of the config's `proj_drop`, which it replaces where given.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        layer_scale_init_value: initial value of every layer scale.
        backend: "auto", "eager" or "triton" for the fused operations, see `effformer.ops`; `set_backend` changes it.
        device, dtype: of parameters and buffers.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.

    Source: models/efficientformer.py of the original repository; timm/models/efficientformer.py for the interface.
    """

    pretrained_cfg: dict[str, Any]  # timm's; `create_model` sets it
    default_cfg: dict[str, Any]
    backend: str = "auto"

    def __init__(
        self,
        config: EfficientFormerConfig,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float | None = None,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-5,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, EfficientFormerConfig):
            raise TypeError(f"config: got {type(config).__name__}, allowed is an EfficientFormerConfig")
        if proj_drop_rate is not None:
            config = replace(config, proj_drop=check("proj_drop_rate", proj_drop_rate, PROBABILITY))
        in_chans = check_count("in_chans", in_chans, least=1)
        num_classes = check_count("num_classes", num_classes)
        check_choice("global_pool", global_pool, POOLS)
        check_choice("backend", backend, ops.BACKENDS)
        drop_rate = check("drop_rate", drop_rate, PROBABILITY)
        drop_path_rate = check("drop_path_rate", drop_path_rate, PROBABILITY)
        layer_scale_init_value = check("layer_scale_init_value", layer_scale_init_value, FINITE)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype: got {dtype}, allowed is a floating dtype")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        self.config = config
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.drop_rate = drop_rate
        self.drop_path_rate = drop_path_rate
        self.distilled_training = False
        self.num_features = self.head_hidden_size = config.widths[-1]
        self.feature_info = [
            {"num_chs": width, "reduction": 4 * 2**index, "module": f"stages.{index}"}
            for index, width in enumerate(config.widths)
        ]

        self.backend = backend
        self.stem = Stem(in_chans, config.widths[0], backend, **dd)
        total = sum(config.depths)
        drop_paths = [drop_path_rate * index / max(total - 1, 1) for index in range(total)]
        stages = []
        for index, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            first = sum(config.depths[:index])
            stages.append(
                Stage(
                    config.widths[index - 1] if index else None,
                    width,
                    drop_paths[first : first + depth],
                    config.num_vit if index == len(config.depths) - 1 else None,
                    config,
                    layer_scale_init_value,
                    backend,
                    **dd,
                )
            )
        self.num_stages = len(stages)
        self.stages = nn.Sequential(*stages)
        if config.feature_norm is not None:
            self.feature_norms = nn.ModuleList(nn.GroupNorm(1, width, **dd) for width in config.widths)
        self.norm: nn.Module = nn.LayerNorm(self.num_features, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._new_head(num_classes, **dd)
        self.head_dist = self._new_head(num_classes, **dd)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)

    def _new_head(self, num_classes: int, **dd: Any) -> nn.Module:
        return nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()

    # --- inference ---------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, num_classes] of images [B, in_chans, H, W]; `forward_head` describes the other results."""
        if replaces(self, EfficientFormer, "forward_features"):
            return self.forward_head(self.forward_features(x))
        for output in self._run_stages(x, len(self.stages)):
            x = output.features
        logits = live.run(End(self), x)
        return self.forward_head(self.norm(x)) if logits is None else logits

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens [B, N, C] after the final norm, N = ceil(H / 32) * ceil(W / 32); a map once stages were pruned."""
        for output in self._run_stages(x, len(self.stages)):
            x = output.features
        return self.norm(x)

    @overload
    def forward_head(self, x: Tensor, pre_logits: Literal[True]) -> Tensor: ...
    @overload
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]: ...
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of the result of `forward_features`, or the pooled features [B, C] with `pre_logits`.

        In distilled training it returns the two heads' logits as a pair, otherwise their mean.
        """
        if self.global_pool == "avg":
            x = x.mean(dim=1)
        x = self.head_drop(x)
        if pre_logits:
            return x
        if self.distilled_training and self.training:
            return self.head(x), self.head_dist(x)
        return self.logits(x)

    def logits(self, pooled: Tensor) -> Tensor:
        """Mean of both heads' logits [B, num_classes] of pooled features [B, C].

        Raises:
            ValueError: where the heads return two shapes, or one was taken away.
        """
        if self.head is None or self.head_dist is None:
            raise ValueError("head, head_dist: got None, allowed are modules: reset_classifier(0) takes both away")
        return mean_of_heads(self.head(pooled), self.head_dist(pooled))

    @overload
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: Literal[False] = False,
    ) -> tuple[Tensor, list[Tensor]]: ...
    @overload
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        *,
        intermediates_only: Literal[True],
    ) -> list[Tensor]: ...
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The stages' maps, as in timm.

        Args:
            x: images [B, in_chans, H, W].
            indices: stages to return: all (None), the last n (an int), or these (negative counts from the end).
            norm: apply the final LayerNorm to the last stage's map; not with `feature_norm`, whose maps are normalised.
            stop_early: do not run the stages after the last one wanted.
            output_fmt: "NCHW" is the only one.
            intermediates_only: return the maps alone.

        Returns:
            the result of `forward_features`, and the maps [B, C, h, w], h = ceil(H / reduction), in the stages' order.

        Raises:
            ValueError: for an index out of range or another `output_fmt`.
        """
        check_choice("output_fmt", output_fmt, ("NCHW",))
        if norm and self.config.feature_norm is not None:
            raise ValueError(f"norm: got True, allowed is False with feature_norm={self.config.feature_norm!r}")
        take, last = _take_indices(indices, len(self.stages))
        intermediates = []
        for output in self._run_stages(x, last + 1 if stop_early else len(self.stages)):
            x, tokens = output.features, output.tokens_of is not None
            if output.stage in take:
                feature = self.norm(x) if norm and tokens else x
                feature = to_map(feature, *output.tokens_of) if output.tokens_of else feature
                if self.config.feature_norm == "tap":
                    feature = self.feature_norms[output.stage](feature)
                intermediates.append(feature)
        if intermediates_only:
            return intermediates
        return (self.norm(x) if tokens else x), intermediates

    def _run_stages(self, x: Tensor, stop: int) -> Iterator[StageOutput]:
        """The outputs of the first `stop` stages on images `x`."""
        x = self.stem(check_images(x, self.in_chans, self.stem.conv1.weight))
        size = (x.shape[2], x.shape[3])
        for index, stage in zip(range(stop), cast("Iterable[Stage]", self.stages), strict=False):
            size = stage.output_size(*size)
            x = stage(x)
            tokens_of = size if index == self.num_stages - 1 else None
            if self.config.feature_norm == "inline":
                norm = self.feature_norms[index]
                x = norm(x) if tokens_of is None else norm(to_map(x, *tokens_of)).flatten(2).transpose(1, 2)
            yield StageOutput(index, x, tokens_of)

    # --- the interface of timm's tools --------------------------------------------------------------------------------

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the parts that `forward_intermediates(indices=indices)` does not need; returns indices from 0 on."""
        take, last = _take_indices(indices, len(self.stages))
        prune_end = last < len(self.stages) - 1
        self.stages = nn.Sequential(*list(self.stages)[: last + 1])
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        if prune_end:
            self.num_features = self.head_hidden_size = self.config.widths[last]
            if self.config.feature_norm is not None:
                self.feature_norms = self.feature_norms[: last + 1]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """The classification head and the distillation head."""
        return self.head, self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Fresh heads for `num_classes` (0 for none), on the device and in the dtype of the others."""
        num_classes = check_count("num_classes", num_classes)
        global_pool = self.global_pool if global_pool is None else global_pool
        check_choice("global_pool", global_pool, POOLS)
        if len(self.stages) < self.num_stages and (num_classes or global_pool):
            raise ValueError("num_classes, global_pool: allowed are 0 and '' once the last stage was pruned")
        weight = self.stem.conv1.weight
        self.num_classes, self.global_pool = num_classes, global_pool
        for name in ("head", "head_dist"):
            head = self._new_head(num_classes, device=weight.device, dtype=weight.dtype).train(self.training)
            if isinstance(head, nn.Linear):
                init_linear(head)
            setattr(self, name, head)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in cast("Iterable[Stage]", self.stages):
            stage.grad_checkpointing = enable

    def set_distilled_training(self, enable: bool = True) -> None:
        """Return both heads' logits, as a pair, in training mode."""
        self.distilled_training = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimiser should not decay: the bias tables."""
        return {name for name, _ in self.named_parameters() if "attention_biases" in name}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters by depth, for layer-wise learning rates."""
        return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), (r"^(?:feature_norms|norm)\b", (99999,))]}


CONSTRUCTOR_FIELDS = tuple(name for name in inspect.signature(EfficientFormer).parameters if name != "config")


def init_linear(linear: nn.Linear) -> None:
    """The original initialisation of Linear layers: truncated normal with std 0.02, bias 0."""
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)


def _take_indices(indices: int | Sequence[int] | None, count: int) -> tuple[list[int], int]:
    """Indices as non-negative numbers in the caller's order, and the largest."""
    last = count if indices is None else as_int(indices)
    if last is not None:
        if not 1 <= last <= count:
            raise ValueError(f"indices: got the last {last}, allowed are 1 to {count}")
        take = list(range(count - last, count))
    else:
        wanted = [as_int(index) for index in indices] if isinstance(indices, Iterable) else []
        take = [index + count if index < 0 else index for index in wanted if index is not None]
        if not take or len(take) < len(wanted) or any(not 0 <= index < count for index in take):
            raise ValueError(f"indices: got {indices!r}, allowed are numbers from {-count} to {count - 1}")
    return take, max(take)


def set_backend(model: nn.Module, backend: str) -> None:
    """Set the backend of the fused operations in every part of `model`: "auto", "eager" or "triton".

    Raises:
        TypeError: for another object than a module.
        ValueError: for another backend, or a model without EfficientFormer blocks.
    """
    check_choice("backend", backend, ops.BACKENDS)
    allowed = "a module that holds blocks of effformer"
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {class_of(model)}, allowed is {allowed}")
    parts = [m for m in model.modules() if isinstance(m, (Meta4D, Meta3D, Attention, Stem, EfficientFormer))]
    if not parts:
        hint = ": effformer.accelerate makes one of it" if is_efficientformer(model) else remedy(model)
        raise ValueError(f"model: got {class_of(model)}, allowed is {allowed}{hint}")
    for part in parts:
        part.backend = backend
