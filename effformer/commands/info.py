"""List models, versions, devices and backends.

List the models' parameters, multiply-accumulates and feature maps at an image size, the versions in
use, and this machine's devices with the backend that each one gets, and why. With --explain, tell how
each part of a model computes an image here, and why.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..config import PRESETS
from . import common

if TYPE_CHECKING:
    from ..apps.explain import Explanation


def add(commands: common.Commands) -> None:
    parser = common.add_command(commands, "info", main, __doc__)
    common.add_size(parser)
    parser.add_argument("--explain", type=common.model, metavar="MODEL", help="l1, l3 or l7: how its parts compute")
    parser.add_argument("--dtype", type=common.dtype, help="with --explain; default: fp32")
    common.add_device(parser)
    common.add_json(parser)


def main(arguments: argparse.Namespace) -> int:
    import torch

    from ..apps.info import describe_backend, devices, summarise, versions
    from ..kernels.tiling.choose import user_file

    height, width = arguments.size
    for option, given in (("--dtype", arguments.dtype), ("--device", arguments.device != "auto")):
        if given and not arguments.explain:
            raise ValueError(f"{option}: allowed is only together with --explain")
    explanation = _explained(arguments) if arguments.explain else None
    models = [summarise(name, height, width) for name in PRESETS]
    backends = {name: describe_backend("auto", torch.device(name)) for name in devices()}
    tuned = str(user_file()) if user_file().exists() else None
    if arguments.json:
        facts: dict[str, Any] = {
            "versions": versions(),
            "tuned_configurations": tuned,
            "devices": devices(),
            "backends": backends,
            "size": [height, width],
            "models": [asdict(model) for model in models],
        }
        if explanation is not None:
            facts["explanation"] = asdict(explanation)["parts"]
        common.print_json(facts)
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
    if explanation is not None:
        print(f"\n{arguments.explain}, one image of {height}x{width} in {arguments.dtype or 'float32'}:\n{explanation}")
    return 0


def _explained(arguments: argparse.Namespace) -> Explanation:
    import torch

    from ..apps.explain import explain
    from ..factory import create_model

    device, dtype = common.torch_device(arguments.device), common.torch_dtype(arguments.dtype or "float32")
    model = create_model(arguments.explain, device=device, dtype=dtype).eval()
    with torch.no_grad():
        return explain(model, torch.zeros(1, 3, *arguments.size, device=device, dtype=dtype))
