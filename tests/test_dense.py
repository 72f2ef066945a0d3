"""The adapters to detection frameworks: their conventions, and the network's features."""

from __future__ import annotations

import copy
import importlib
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.bench.measure.timm_model import import_torchvision
from torch import Tensor, nn

from effformer import EfficientFormer, build_backbone, create_model
from effformer.features import Features
from effformer.openmm import EffFormer
from effformer.testing import randomise

Narrow = Callable[..., EfficientFormer]
WIDTHS = [8, 12, 16, 24]
IMAGES = torch.randn(2, 3, 75, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def vision() -> Any:
    import_torchvision()
    return importlib.import_module("effformer.torchvision")


def maps_of(network: EfficientFormer, indices: list[int] | None = None) -> list[Tensor]:
    with torch.no_grad():
        return copy.deepcopy(network).forward_intermediates(IMAGES, indices=indices, intermediates_only=True)


def all_equal(found: Any, wanted: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def assert_all_trained(module: nn.Module, loss: Tensor) -> None:
    loss.backward()
    without = [
        name
        for name, p in module.named_parameters()
        if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()
    ]
    assert not without


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 3), (0, 2), (1,)])
def test_features_of_the_stages_wanted_and_nothing_that_they_do_not_need(
    narrow: Narrow, indices: tuple[int, ...]
) -> None:
    network = narrow(feature_norm="tap")
    wanted = maps_of(network, list(indices))
    features = Features(network, indices)
    assert all_equal(features(IMAGES), wanted)
    assert features.channels == [feature.shape[1] for feature in wanted] == [WIDTHS[index] for index in indices]
    assert features.strides == [4 << index for index in indices]
    assert [feature.shape[2] for feature in wanted] == [-(-75 // stride) for stride in features.strides]
    assert_all_trained(features, sum((feature**2).sum() for feature in features(IMAGES)))


def test_features_of_netspressos_backbone(narrow: Narrow) -> None:
    from conftest import NETSPRESSO_L1

    stages = [{"num_blocks": 2, "channels": width} for width in WIDTHS]
    backbone = build_backbone(NETSPRESSO_L1 | {"stage_params": stages}, task="detection", dtype=torch.float64)
    randomise(backbone).eval()
    with torch.no_grad():
        wanted = backbone(IMAGES)["intermediate_features"]
        assert all_equal(Features(backbone)(IMAGES), wanted)


def test_wrong_arguments_of_features(narrow: Narrow) -> None:
    network = narrow()
    for indices in ((), (1, 0), (0, 0), (4,), (-1,), 2, None, "12", (1.0, 2.0), (True,)):
        with pytest.raises(ValueError, match=r"out_indices: got .*, allowed are, in this order, 0, 1, 2, 3"):
            Features(network, indices)  # type: ignore[arg-type]
    assert len(network.stages) == 4  # what is refused is left as it was
    with pytest.raises(TypeError, match="model: got Linear"):
        Features(nn.Linear(1, 1))


# --- torchvision -----------------------------------------------------------------------------------------------------


def test_torchvisions_pyramid_on_our_maps(narrow: Narrow, vision: Any) -> None:
    from torchvision.ops import FeaturePyramidNetwork
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    network = narrow()
    wanted = maps_of(network, [1, 2, 3])
    model = vision.BackboneWithFPN(network, (1, 2, 3), out_channels=32).double()
    body = model.body(IMAGES)
    assert isinstance(body, OrderedDict)
    assert list(body) == ["0", "1", "2"]
    assert all_equal(body.values(), wanted)
    pyramid = FeaturePyramidNetwork(WIDTHS[1:], 32, LastLevelMaxPool()).double()
    pyramid.load_state_dict(model.fpn.state_dict())
    found, same = model(IMAGES), pyramid(OrderedDict(zip("012", wanted, strict=True)))
    assert list(found) == list(same) == ["0", "1", "2", "pool"]
    assert all_equal(found.values(), list(same.values()))
    assert model.out_channels == 32
    assert_all_trained(model, sum((feature**2).sum() for feature in found.values()))


def test_retinanet_on_a_photograph(vision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "docs" / "examples")
    detect = importlib.import_module("detect")
    assert detect.photograph().shape == (3, 512, 640)
    losses = detect.main(["--steps", "2"])  # it ends with an error where a parameter has no gradient
    assert losses[0] > losses[1]


# --- Detectron2 ------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """The parts of Detectron2 that the adapter uses."""

    class Backbone(nn.Module):
        @property
        def size_divisibility(self) -> int:
            return 0

    @dataclass
    class ShapeSpec:
        channels: int | None = None
        height: int | None = None
        width: int | None = None
        stride: int | None = None

    names = {
        "detectron2": {},
        "detectron2.modeling": {"Backbone": Backbone},
        "detectron2.layers": {"ShapeSpec": ShapeSpec},
    }
    for name, content in names.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "effformer.detectron2", raising=False)
    yield types.SimpleNamespace(Backbone=Backbone, ShapeSpec=ShapeSpec)
    sys.modules.pop("effformer.detectron2", None)


def check_detectron2(narrow: Narrow) -> Any:
    from effformer.detectron2 import EfficientFormerBackbone

    network = narrow()
    wanted = maps_of(network, [0, 2])
    backbone = EfficientFormerBackbone(network, ["res2", "res4"])
    found = backbone(IMAGES)
    assert list(found) == ["res2", "res4"]
    assert all_equal(found.values(), wanted)
    shapes = backbone.output_shape()
    assert {name: (shape.channels, shape.stride) for name, shape in shapes.items()} == {
        "res2": (8, 4),
        "res4": (16, 16),
    }
    assert backbone.size_divisibility == 16
    assert EfficientFormerBackbone(narrow()).size_divisibility == 32
    for names in (["res1"], ["res4", "res2"], [], "res2", 2):
        with pytest.raises(ValueError, match="out_features: got .* res2, res3, res4, res5"):
            EfficientFormerBackbone(network, names)
    return backbone, shapes["res2"]


def test_detectron2s_conventions_without_it(narrow: Narrow) -> None:
    backbone, _ = check_detectron2(narrow)
    assert type(backbone).__mro__[1] is nn.Module


def test_detectron2s_classes_where_it_is_installed(narrow: Narrow, installed: types.SimpleNamespace) -> None:
    backbone, shape = check_detectron2(narrow)
    assert isinstance(backbone, installed.Backbone)
    assert isinstance(shape, installed.ShapeSpec)


def test_detectron2_that_is_broken_is_not_taken_for_absent(
    installed: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "detectron2.modeling")  # now `detectron2` is there, and a part of it is not
    with pytest.raises(ModuleNotFoundError, match=r"detectron2\.modeling"):
        importlib.import_module("effformer.detectron2")


# --- OpenMMLab -------------------------------------------------------------------------------------------------------

SMALL = {"depths": (1, 1, 1, 2), "widths": (8, 12, 16, 24), "num_heads": 2, "key_dim": 4}


def build(type: str, **kwargs: Any) -> nn.Module:
    """As a registry builds from a configuration."""
    return {"EffFormer": EffFormer}[type](**kwargs)


def test_openmms_backbone_from_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "classification.pth"
    state = randomise(create_model("efficientformer_l1", **SMALL)).state_dict()
    torch.save({"model": state}, file)
    pretrained = {"type": "Pretrained", "checkpoint": str(file)}
    model = build("EffFormer", style="pytorch", init_cfg=pretrained, out_indices=(0, 2), **SMALL)
    model.init_weights()
    model.double().eval()

    network = create_model("efficientformer_l1", feature_norm="tap", **SMALL)
    network.load_state_dict(state, strict=False)
    network.double().eval()
    found = model(IMAGES)
    assert isinstance(found, tuple)
    assert all_equal(found, maps_of(network, [0, 2]))


def test_openmms_frozen_statistics() -> None:
    model = build("EffFormer", norm_eval=True, drop_path_rate=0.1, **SMALL).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = copy.deepcopy([norm.state_dict() for norm in norms])
    model(torch.randn(2, 3, 64, 64))
    assert model.training
    for norm, state in zip(norms, before, strict=True):
        assert torch.equal(norm.running_mean, state["running_mean"])
    assert build("EffFormer", **SMALL).train().features.network.stem.norm1.training


def test_openmms_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="style: got 'caffe'"):
        build("EffFormer", style="caffe")
    with pytest.raises(ValueError, match="init_cfg: got"):
        build("EffFormer", init_cfg={"type": "Kaiming"})
    for inherited in ({"depth": 50}, {"num_stages": 4}, {"frozen_stages": 1}, {"norm_cfg": {"type": "BN"}}):  # ResNet's
        with pytest.raises(TypeError, match=f"{next(iter(inherited))}: unknown key"):
            build("EffFormer", **inherited)
    with pytest.raises(TypeError, match="pretrained: got 'torchvision://resnet50'"):
        build("EffFormer", pretrained="torchvision://resnet50")
    state = create_model("efficientformer_l1", **SMALL).state_dict()
    for name, change in (("less", state.pop), ("more", lambda key: state.update({key + "2": torch.zeros(1)}))):
        change("stages.1.blocks.0.ls1.gamma")
        torch.save(state, tmp_path / f"{name}.pth")
        model = build(
            "EffFormer", init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / f"{name}.pth")}, **SMALL
        )
        with pytest.raises(RuntimeError, match=r"init_cfg: .* does not fit the network: stages.1.blocks.0.ls1.gamma"):
            model.init_weights()
