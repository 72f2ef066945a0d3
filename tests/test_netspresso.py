"""Configurations in NetsPresso Trainer's schema, from the file to a step of training, and our place in its registry."""

from __future__ import annotations

import importlib
import sys
import types
from collections import UserDict, UserList
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from dialect_models import Trainer
from test_accelerate import drawn, outputs
from test_timm import assert_equal
from torch import Tensor, nn
from torch.nn import functional as F

import effformer.netspresso
from effformer.reference import bias_index

CONFIGURATIONS = Path(__file__).parent / "netspresso"
TASKS = ("classification", "segmentation", "detection")
CLASSES = 3


class Classifier(nn.Module):
    """The trainer's `fc` of one layer."""

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(feature_dim, CLASSES)

    def forward(self, feature: Tensor) -> Tensor:
        return self.classifier(feature)


class AllMlpDecoder(nn.Module):
    """In the manner of the trainer's, after SegFormer: a linear layer a map, brought to the finest, fused."""

    def __init__(self, intermediate_features_dim: list[int], intermediate_channels: int) -> None:
        super().__init__()
        self.linear = nn.ModuleList(nn.Conv2d(width, intermediate_channels, 1) for width in intermediate_features_dim)
        self.classifier = nn.Conv2d(intermediate_channels * len(self.linear), CLASSES, 1)

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        maps = [linear(feature) for linear, feature in zip(self.linear, features, strict=True)]
        return self.classifier(torch.cat([F.interpolate(m, maps[0].shape[2:], mode="bilinear") for m in maps], 1))


class PyramidHead(nn.Module):
    """In the manner of the trainer's neck `fpn` and its decoupled head: classes and boxes of each pixel of each map."""

    def __init__(self, intermediate_features_dim: list[int]) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, 32, 1) for width in intermediate_features_dim)
        self.classes, self.boxes = nn.Conv2d(32, CLASSES, 3, padding=1), nn.Conv2d(32, 4, 3, padding=1)

    def forward(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        maps = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        for index in (2, 1, 0):
            maps[index] = maps[index] + F.interpolate(maps[index + 1], maps[index].shape[2:])
        return [torch.cat((self.classes(m), self.boxes(m)), 1) for m in maps]


class TaskModel(nn.Module):
    """The trainer's builder and task models, as far as they concern a backbone."""

    def __init__(self, registry: dict[str, Any], conf_model: dict[str, Any]) -> None:
        super().__init__()
        self.task, architecture = conf_model["task"], conf_model["architecture"]
        build = registry[architecture["backbone"]["name"]]
        self.backbone = build(task=self.task, conf_model_backbone=architecture["backbone"])
        widths = self.backbone.intermediate_features_dim
        if self.task == "classification":
            self.head: nn.Module = Classifier(self.backbone.feature_dim)
        elif self.task == "segmentation":
            self.head = AllMlpDecoder(widths, architecture["head"]["params"]["intermediate_channels"])
        else:
            self.head = PyramidHead(widths)
        if conf_model["freeze_backbone"]:
            for parameter in self.backbone.parameters():
                parameter.requires_grad = False

    def forward(self, x: Tensor) -> Any:
        features = self.backbone(x)
        return self.head(features["last_feature" if self.task == "classification" else "intermediate_features"])


def configuration(task: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGURATIONS / f"{task}.yaml").read_text(encoding="utf-8"))["model"]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The trainer's, in a stand-in for its package."""
    package = types.ModuleType("netspresso_trainer.models.registry")
    package.MODEL_BACKBONE_DICT = {"efficientformer": None, "resnet": None}
    for name in ("netspresso_trainer", "netspresso_trainer.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    return package.MODEL_BACKBONE_DICT


def register(name: str = "efficientformer") -> None:
    with pytest.warns(UserWarning, match="use one GPU"):  # the stand-in has no launcher, see test_netspresso_train.py
        effformer.netspresso.register(name)


@pytest.mark.parametrize("task", TASKS)
def test_a_configuration_trains(task: str, registry: dict[str, Any]) -> None:
    register()
    model = TaskModel(registry, configuration(task)).train()
    frozen = task == "segmentation"
    assert all(p.requires_grad != frozen for p in model.backbone.parameters())
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    images, generator = torch.randn(4, 3, 96, 64), torch.Generator().manual_seed(3)
    losses = []
    for _ in range(3):
        out = model(images)
        maps = out if isinstance(out, list) else [out]
        assert [tuple(m.shape[2:]) for m in maps] == {
            "classification": [()], "segmentation": [(24, 16)], "detection": [(24, 16), (12, 8), (6, 4), (3, 2)]
        }[task]  # fmt: skip
        generator.manual_seed(3)
        targets = [torch.randint(CLASSES, (4, *m.shape[2:]), generator=generator) for m in maps]
        loss = sum(F.cross_entropy(m[:, :CLASSES], target) for m, target in zip(maps, targets, strict=True))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    without = {name for name, p in model.backbone.named_parameters() if p.grad is None}
    if frozen:
        assert len(without) == len(list(model.backbone.parameters()))
    else:
        assert without == ({"network.norm.weight", "network.norm.bias"} if task == "detection" else set())


@pytest.mark.parametrize("task", TASKS)
def test_the_trainers_weights_load_into_its_model_with_ours(task: str, registry: dict[str, Any]) -> None:
    register("ours")
    assert registry["efficientformer"] is None
    conf = configuration(task)
    conf["architecture"]["backbone"]["name"] = "ours"
    model = TaskModel(registry, conf).double()

    theirs = drawn(Trainer(task))
    for name, buffer in theirs.named_buffers():
        if name.endswith("bias_idxs"):
            buffer.copy_(bias_index(7, 7))
    state = {f"backbone.{key}": value for key, value in theirs.state_dict().items()}
    state |= {key: value for key, value in model.state_dict().items() if key.startswith("head.")}
    model.load_state_dict(state, strict=True)
    x = torch.randn(2, 3, 96, 160, dtype=torch.float64)
    with torch.no_grad():
        for got, want in zip(outputs(model.eval().backbone, x), outputs(theirs.eval(), x), strict=True):
            assert_equal(got, want)

    fresh = TaskModel(registry, conf).double()
    fresh.load_state_dict(model.state_dict(), strict=True)  # what it saved
    again = effformer.build_backbone(CONFIGURATIONS / f"{task}.yaml").double()
    report = effformer.load_checkpoint(again, model.state_dict())
    assert report.ignored == tuple(key for key in model.state_dict() if key.startswith("head."))


def test_nodes_that_are_no_dicts_and_no_lists() -> None:
    """As OmegaConf's, which are mappings and sequences."""
    backbone = configuration("detection")["architecture"]["backbone"]
    stages = UserList([UserDict(stage) for stage in backbone["stage_params"]])
    node = UserDict(backbone | {"params": UserDict(backbone["params"]), "stage_params": stages})
    assert effformer.netspresso.efficientformer("detection", node).network.config.widths == (48, 96, 224, 448)


def test_without_the_trainer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "netspresso_trainer", None)
    with pytest.raises(ImportError, match="NetsPresso Trainer is not installed: pip install netspresso-trainer"):
        effformer.netspresso.register()
    assert effformer.netspresso.main(["train"]) == 1
    assert capsys.readouterr().err.endswith("NetsPresso Trainer is not installed: pip install netspresso-trainer\n")
    # Installed, without a library that it needs.
    broken = types.ModuleType("netspresso_trainer.models.registry")
    broken.__dict__["__getattr__"] = lambda name: importlib.import_module("no_such_library")
    for name in ("netspresso_trainer", "netspresso_trainer.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, broken.__name__, broken)
    with pytest.raises(ImportError, match="no_such_library"):
        effformer.netspresso.register()
