"""`effformer export`: a network as a file for other runtimes."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..serving.export import export
from .common import DTYPES, network_of, torch_device


def main(arguments: argparse.Namespace) -> int:
    target: Path = arguments.target
    if target.exists() and not arguments.force:
        raise FileExistsError(f"{target} exists: --force replaces it")
    device = torch_device(arguments.device)
    network, name, _, weights = network_of(arguments.model, arguments.checkpoint, "eager")
    print(f"model:    {name}, weights: {'random (seed 0)' if weights == 'none' else weights}", flush=True)
    written = export(
        network.to(device).eval(),
        target,
        arguments.format,
        output=arguments.output,
        size=arguments.size,
        dynamic_size=arguments.dynamic_size,
        dtype=DTYPES[arguments.dtype],
        backend=arguments.backend,
    )
    print(written)
    return 0
