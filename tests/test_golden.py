"""Outputs of the three public implementations, reproduced from checkpoints in their own naming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import seeded
import torch
from conftest import NETSPRESSO_L1
from safetensors import safe_open
from torch import Tensor, nn

from effformer import build_backbone, create_model, load_checkpoint

GOLDEN = Path(__file__).parent / "golden"


def _named(maps: list[Tensor] | tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"c{level}": feature for level, feature in enumerate(maps, 2)}


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    outputs: Callable[[nn.Module, Tensor], dict[str, Tensor]]
    format: str


CASES = {
    "snap_l1_classification_224": Case(
        lambda: create_model("efficientformer_l1"), lambda model, x: {"logits": model(x)}, "original"
    ),
    "snap_l3_classification_224": Case(
        lambda: create_model("efficientformer_l3"), lambda model, x: {"logits": model(x)}, "original"
    ),
    "timm_l1_features_224": Case(
        lambda: create_model("efficientformer_l1"),
        lambda model, x: _named(model.forward_intermediates(x, intermediates_only=True)) | {"logits": model(x)},
        "timm",
    ),
    "netspresso_l1_classification_224": Case(
        lambda: build_backbone(NETSPRESSO_L1), lambda model, x: model(x), "netspresso"
    ),
    "netspresso_l1_segmentation_256x320": Case(
        lambda: build_backbone(NETSPRESSO_L1, task="segmentation"),
        lambda model, x: _named(model(x)["intermediate_features"]),
        "netspresso",
    ),
    "snap_l1_dense_256x320": Case(
        lambda: create_model(
            "efficientformer_l1",
            num_classes=0,
            bias_resize="matrix-bicubic",
            table_resolution=16,
            feature_norm="tap",
        ),
        lambda model, x: _named(model.forward_intermediates(x, intermediates_only=True)),
        "original-dense",
    ),
}


def checkpoint(name: str) -> dict[str, Tensor]:
    """The seeded float64 checkpoint behind a golden file, in its implementation's naming."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        seed = int(file.metadata()["seed"])
    return seeded.state_dict(seeded.load_manifest(GOLDEN / f"{name}.json"), seed)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        batch, height, width, seed = (int(file.metadata()[key]) for key in ("batch", "height", "width", "seed"))
        expected = {key: file.get_tensor(key).double() for key in file.keys()}  # noqa: SIM118
    model = case.build().to(dtype).eval()
    report = load_checkpoint(model, checkpoint(name))
    assert report.format == case.format

    outputs = case.outputs(model, seeded.images(batch, height, width, seed).to(dtype))
    assert outputs.keys() == expected.keys()
    # The files hold float32: half a unit in the last place is 6e-8 relative.
    tolerance = 1e-7 if dtype == torch.float64 else 1e-4
    for key, want in expected.items():
        got = outputs[key].double()
        assert got.shape == want.shape
        assert (got - want).abs().max() <= tolerance * want.abs().max(), key
