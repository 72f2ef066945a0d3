"""`effformer convert`: checkpoint formats."""

from __future__ import annotations

import argparse
from pathlib import Path

import safetensors.torch
import torch

from ..checkpoints import hub
from ..checkpoints.formats import convert_state_dict, normalise
from ..checkpoints.load import read_state_dict


def main(arguments: argparse.Namespace) -> int:
    target: Path = arguments.target
    if target.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"TARGET: got {target}, allowed are *.safetensors, *.pth and *.pt")
    if target.exists() and not arguments.force:
        raise FileExistsError(f"{target} exists: --force replaces it")
    _, state = read_state_dict(hub.locate(arguments.source))
    file = normalise(state)
    converted = convert_state_dict(state, arguments.to)
    separate = {key: value.clone(memory_format=torch.contiguous_format) for key, value in converted.items()}
    try:
        if target.suffix == ".safetensors":
            safetensors.torch.save_file(separate, target, {"format": "pt"})
        else:
            torch.save(separate, target)
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise OSError(f"{target} cannot be written: {error}") from error
    print(f"{arguments.source} ({file.format}) -> {target} ({arguments.to}): {len(converted)} tensors")
    for key in file.ignored:
        print(f"  left out: {key}")
    return 0
