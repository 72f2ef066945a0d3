"""A Hugging Face cache as the hub would have filled it, with random weights in place of the published ones."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import safetensors.torch

from effformer import create_model
from effformer.checkpoints.hub import PRETRAINED
from effformer.testing import randomise

REVISION = "0" * 40


def write(cache: Path, names: Iterable[str] = ("efficientformer_l1",)) -> None:
    """Put randomised weights of `names` where `pretrained=True` looks for them, with HF_HUB_CACHE set to `cache`."""
    for name in names:
        repository = cache / f"models--{PRETRAINED[name].replace('/', '--')}"
        snapshot = repository / "snapshots" / REVISION
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(REVISION)
        network = randomise(create_model(name))
        safetensors.torch.save_file(network.state_dict(), snapshot / "model.safetensors")
        (snapshot / "config.json").write_text(
            json.dumps({
                "architecture": name,
                "num_classes": 1000,
                "num_features": network.config.widths[-1],
                "pretrained_cfg": {
                    "tag": "snap_dist_in1k",
                    "input_size": [3, 224, 224],
                    "crop_pct": 0.95,
                    "interpolation": "bicubic",
                    "mean": [0.485, 0.456, 0.406],
                    "std": [0.229, 0.224, 0.225],
                },
            })
        )  # fmt: skip


def use(cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Make huggingface_hub read files from `cache` only."""
    constants = pytest.importorskip("huggingface_hub.constants")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
