"""`effformer info`: models, versions, devices, backend."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import torch

from ..apps.info import describe_backend, devices, summarise, versions
from ..config import PRESETS
from ..kernels.tiling.choose import user_file


def main(arguments: argparse.Namespace) -> int:
    height, width = arguments.size
    models = [summarise(name, height, width) for name in PRESETS]
    backends = {name: describe_backend("auto", torch.device(name)) for name in devices()}
    tuned = str(user_file()) if user_file().exists() else None
    if arguments.json:
        facts = {
            "versions": versions(),
            "tuned_configurations": tuned,
            "devices": devices(),
            "backends": backends,
            "size": [height, width],
            "models": [asdict(model) for model in models],
        }
        print(json.dumps(facts, indent=2))
        return 0
    print("  ".join(f"{name} {version}" for name, version in versions().items()))
    for name, description in devices().items():
        print(f"device {name}: {description}\n  backend: {backends[name]}")
    if tuned:
        print(f"tiles tuned here: {tuned}")
    print(f"\n{'model':<20}{'parameters':>12}{'MACs':>10}   feature maps of an image of {height}x{width}")
    for model in models:
        maps = "  ".join("x".join(map(str, shape)) for shape in model.features)
        print(f"{model.name:<20}{model.parameters / 1e6:>10.2f} M{model.macs / 1e9:>8.2f} G   {maps}")
    return 0
