"""Errors of `freeze` and of frozen networks: wrong arguments, changed models, wrong images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from frozen_results import MEAN, STD
from torch import nn

from effformer import EfficientFormer, freeze
from effformer.ops import UnsupportedError


def test_bad_arguments(narrow: Callable[..., EfficientFormer]) -> None:
    model = narrow()
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "dtype: got torch.int8", {"dtype": torch.int8}),
        (ValueError, "output: got 'maps'", {"output": "maps"}),
        (ValueError, "when_full: got 'wait'", {"when_full": "wait"}),
        (ValueError, "backend: got 'cuda'", {"backend": "cuda"}),
        (ValueError, "max_graphs: got -1", {"max_graphs": -1}),
        (ValueError, "std: got None", {"mean": MEAN}),
        (ValueError, "mean: got None", {"std": STD}),
        (ValueError, "mean: got \\(0.5,\\)", {"mean": (0.5,), "std": STD}),
        (ValueError, "mean: got 0.5, allowed are 3 numbers", {"mean": 0.5, "std": 0.2}),
        (ValueError, "mean: got abc, allowed are 3 numbers", {"mean": "abc", "std": STD}),
        (ValueError, "mean: .* 0 to 1", {"mean": (123.0, 117.0, 104.0), "std": STD}),
        (ValueError, "std: .* more than 0", {"mean": MEAN, "std": (0.2, 0.0, 0.2)}),
        (UnsupportedError, "backend='triton'", {"backend": "triton", "dtype": torch.float64}),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            freeze(model, **arguments)
    with pytest.raises(TypeError, match="model: got Linear"):
        freeze(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model: got one in training mode"):
        freeze(narrow().train())
    with pytest.raises(ValueError, match="without heads"):
        freeze(narrow(num_classes=0))


def _hook(model: EfficientFormer) -> None:
    model.stages[0].blocks[0].register_forward_hook(lambda *_: None)  # type: ignore[union-attr, index, operator]


def _stem_activation(model: EfficientFormer) -> None:
    model.stem.act2 = nn.GELU()  # type: ignore[assignment]


def _stem_geometry(model: EfficientFormer) -> None:
    model.stem.conv1.padding = (0, 0)


def _statistics(model: EfficientFormer) -> None:
    model.stages[1].downsample.norm.train()  # type: ignore[union-attr, operator]


def _block(model: EfficientFormer) -> None:
    model.stages[2].blocks[0] = nn.Identity()  # type: ignore[index, union-attr, operator]
    model.stages[2].blocks[0].forward = lambda x: 2 * x  # type: ignore[index, union-attr]


def _training(model: EfficientFormer) -> None:
    model.train()


def _head(model: EfficientFormer) -> None:
    model.head = nn.Sequential(model.head)


def _whole(model: EfficientFormer) -> None:
    model.register_forward_pre_hook(lambda *_: None)


def _stem_longer(model: EfficientFormer) -> None:
    model.stem.add_module("more", nn.Sigmoid())


def _stem_moved(model: EfficientFormer) -> None:
    model.stem._modules["act1"] = model.stem._modules.pop("act1")


def _stem_shorter(model: EfficientFormer) -> None:
    del model.stem.act2


def _no_block(model: EfficientFormer) -> None:
    model.stages[2].blocks[0] = nn.Identity()  # type: ignore[index, union-attr, operator]


def _no_stage(model: EfficientFormer) -> None:
    model.stages[0] = nn.Identity()


def _groups(model: EfficientFormer) -> None:
    model.feature_norms[0] = nn.GroupNorm(2, 8).double()


def _no_affine(model: EfficientFormer) -> None:
    model.feature_norms[0] = nn.GroupNorm(1, 8, affine=False)


def _no_norm(model: EfficientFormer) -> None:
    model.feature_norms[0] = nn.Identity()


def _dropout(model: EfficientFormer) -> None:
    model.head_drop.p = 0.5
    model.head_drop.train()


@pytest.mark.parametrize(
    "change",
    [
        _hook,
        _stem_activation,
        _stem_geometry,
        _stem_longer,
        _stem_moved,
        _stem_shorter,
        _statistics,
        _block,
        _no_block,
        _no_stage,
        _groups,
        _no_affine,
        _no_norm,
        _training,
        _dropout,
        _head,
        _whole,
    ],
)
def test_a_changed_model_is_refused(
    narrow: Callable[..., EfficientFormer], change: Callable[[EfficientFormer], None]
) -> None:
    """It is refused: a frozen form without the change would be wrong."""
    model = narrow(feature_norm="inline")
    freeze(model)
    change(model)
    with pytest.raises(ValueError, match=r"^model: "):
        freeze(model)


def test_an_activation_with_parameters_is_refused(narrow: Callable[..., EfficientFormer]) -> None:
    with pytest.raises(ValueError, match="stages.0.blocks.0: activation 'prelu' has parameters"):
        freeze(narrow(act="prelu"))


def test_bad_images(narrow: Callable[..., EfficientFormer]) -> None:
    model = narrow()
    plain, pixels = freeze(model, torch.float32), freeze(model, torch.float32, mean=MEAN, std=STD)
    with pytest.raises(TypeError, match=r"allowed for uint8 is a model frozen with mean and std"):
        plain(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"got torch.float64, allowed is torch.float32 and torch.uint8"):
        pixels(torch.zeros(1, 3, 64, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"got shape \[1, 64, 64, 3\], allowed is \[B, 3, H, W\]$"):
        plain(torch.zeros(1, 64, 64, 3))
    with pytest.raises(TypeError, match=r"images: got ndarray, allowed is a torch.Tensor"):
        pixels(torch.zeros(1, 3, 64, 64, dtype=torch.uint8).numpy())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"images: got shape \[1, 3, 64, 0\], allowed are sides of 1 or more"):
        pixels(torch.zeros(1, 64, 0, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="may be either"):
        pixels(torch.zeros(1, 3, 64, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="a tensor on meta, allowed is cpu"):
        plain(torch.zeros(1, 3, 64, 64, device="meta"))
    with pytest.raises(ValueError, match="requires a gradient"):
        plain(torch.zeros(1, 3, 64, 64, requires_grad=True))
    with torch.no_grad():
        plain(torch.zeros(1, 3, 64, 64, requires_grad=True))
