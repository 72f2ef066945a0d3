"""Frozen adapters return the same as before; for other libraries' models an error names `accelerate`."""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from effformer.bench.measure.timm_model import import_torchvision
from torch import Tensor, nn

from effformer import EfficientFormer, build_backbone, export, freeze
from effformer.features import Features
from effformer.openmm import EffFormer
from effformer.testing import randomise

Narrow = Callable[..., EfficientFormer]
IMAGES = torch.randn(2, 3, 75, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
YAML = {
    "name": "efficientformer",
    "params": {
        "num_attention_heads": 2, "attention_channels": 8, "attention_dropout_prob": 0.0,
        "attention_value_expansion_ratio": 2, "ffn_intermediate_ratio": 2, "ffn_dropout_prob": 0.0,
        "ffn_act_type": "gelu", "vit_num": 1,
    },
    "stage_params": [{"num_blocks": 1, "channels": width} for width in (8, 8, 16, 24)],
}  # fmt: skip


@pytest.fixture(scope="module")
def vision() -> Any:
    import_torchvision()
    return importlib.import_module("effformer.torchvision")


def same(found: Any, expected: Any) -> None:
    """The same containers and names, and the same values but for rounding."""
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            same(found[name], expected[name])
    else:
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)


def check(adapter: nn.Module) -> Any:
    """The frozen adapter returns the adapter's results, with its own weights, then with new ones."""
    randomise(adapter.eval().double(), 1)
    frozen = freeze(adapter, torch.float64)  # type: ignore[arg-type]
    with torch.no_grad():
        same(frozen(IMAGES), adapter(IMAGES))
        before = frozen(IMAGES)
        randomise(adapter, 2)
        for parameter in adapter.parameters():
            parameter.add_(0.01)
        same(frozen(IMAGES), before)
        frozen.refresh()
        same(frozen(IMAGES), adapter(IMAGES))
    return frozen


@pytest.mark.parametrize("norm", [None, "tap", "inline"])
@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 3), (0, 2)])
def test_features_of_chosen_stages(narrow: Narrow, vision: Any, norm: str | None, indices: tuple[int, ...]) -> None:
    check(Features(narrow(feature_norm=norm), indices))
    check(vision.Body(narrow(feature_norm=norm), indices))


def test_a_pyramid(narrow: Narrow, vision: Any) -> None:
    frozen = check(vision.BackboneWithFPN(narrow(), (1, 2, 3), out_channels=16))
    assert list(frozen(IMAGES)) == ["0", "1", "2", "pool"]
    half = freeze(vision.BackboneWithFPN(narrow(), out_channels=16).eval(), torch.bfloat16)
    assert {one.dtype for one in half(IMAGES.bfloat16()).values()} == {torch.bfloat16}


def test_the_networks_of_frozen_adapters_are_freed(narrow: Narrow, vision: Any) -> None:
    for build in (Features, vision.Body, lambda network: vision.BackboneWithFPN(network, out_channels=8)):
        network = narrow()
        gone, frozen = weakref.ref(network), freeze(build(network).eval(), torch.float64)
        del network
        gc.collect()
        assert gone() is None
        with pytest.raises(ValueError, match="the frozen model no longer exists"):
            frozen.refresh()


def test_weights_come_from_an_adapter_of_the_same_kind(narrow: Narrow, vision: Any) -> None:
    body, pyramid = vision.Body(narrow()).eval(), vision.BackboneWithFPN(narrow(), out_channels=8).eval()
    for frozen, other in (
        (freeze(body), Features(narrow()).eval()),
        (freeze(pyramid), vision.BackboneWithFPN(narrow(), out_channels=16).eval()),
    ):
        with pytest.raises(ValueError, match="allowed is the frozen model's kind, and sizes"):
            frozen.refresh(other)
    features = freeze(narrow(), torch.float64, output="features")
    features.refresh(body.double())  # maps are asked for, whatever the adapter makes of them
    assert isinstance(features(IMAGES), list)


def test_methods_of_a_subclass_may_have_any_name(narrow: Narrow) -> None:
    class Named(EfficientFormer):
        def describe_for_freeze(self) -> None: ...

    network = narrow()
    network.__class__ = Named
    assert freeze(network, torch.float64)(IMAGES).shape == (2, 10)


def test_openmm_and_detectron2(narrow: Narrow) -> None:
    sizes = {"widths": (8, 12, 16, 24), "depths": (1, 1, 1, 2), "num_heads": 2, "key_dim": 4}
    check(EffFormer("efficientformer_l1", (0, 3), **sizes))
    backbone = importlib.import_module("effformer.detectron2").EfficientFormerBackbone
    check(backbone(narrow(), ("res3", "res5")))


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_the_trainers_backbone(task: str) -> None:
    backbone = build_backbone(YAML, task=task)
    frozen = check(backbone)
    assert frozen.output == ("pooled" if task == "classification" else "features")
    maps = freeze(backbone, torch.float64, output="features")(IMAGES)
    assert isinstance(maps, list)
    other = build_backbone(YAML, task="detection" if task == "classification" else "classification").eval().double()
    with pytest.raises(ValueError, match="model: got a Backbone, allowed is the frozen model's kind, and sizes"):
        frozen.refresh(other)


@pytest.mark.parametrize("place", ["", "body"])
def test_hooks_of_adapters_are_not_lost(narrow: Narrow, vision: Any, place: str) -> None:
    adapter = vision.BackboneWithFPN(narrow(), out_channels=16).eval()
    adapter.get_submodule(place).register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="model: its .* has hooks or another forward, allowed are none"):
        freeze(adapter)


def test_other_libraries_models_are_to_be_accelerated(timm: Any, narrow: Narrow) -> None:
    theirs = timm.create_model("efficientformer_l1", device="meta").eval()
    for refuse in (lambda: freeze(theirs), lambda: export(theirs, "model.pt2")):
        with pytest.raises(
            TypeError, match=r"model: got EfficientFormer of timm, .*: pass effformer.accelerate\(model\)"
        ):
            refuse()
    with pytest.raises(TypeError, match="model: got Linear, allowed is an EfficientFormer .* of effformer$"):
        freeze(nn.Linear(1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("part", ["network", "encoder"])
def test_models_of_the_original_and_of_netspresso_are_known(part: str) -> None:
    model = nn.ModuleDict({"patch_embed": nn.Identity(), part: nn.Identity()})
    with pytest.raises(TypeError, match="pass effformer.accelerate"):
        freeze(model)  # type: ignore[arg-type]
