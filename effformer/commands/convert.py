"""Rewrite a checkpoint in another format.

SOURCE is a checkpoint of timm, the original repository (classification or dense) or NetsPresso Trainer;
its keys show which. The suffix of TARGET chooses a safetensors or a torch file.

For example:
  effformer convert efficientformer_l1_1000d.pth l1.safetensors --to timm
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from . import common


def add(commands: common.Commands) -> None:
    parser = common.add_command(commands, "convert", main, __doc__, "TARGET is as it was")
    option = parser.add_argument
    option("source", metavar="SOURCE", help="file, folder, or hub id owner/name")
    option("target", type=Path, metavar="TARGET", help="*.safetensors, *.pth or *.pt")
    option("--to", type=common.one_of("checkpoints.formats", "TARGETS"), default="timm", metavar="NAMING", help="timm, "
           "original, or effformer (timm's names, and names for the feature norms of dense variants); "
           "default: %(default)s")  # fmt: skip
    option("--force", action="store_true", help="replace TARGET if it exists")
    common.add_json(parser)


def main(arguments: argparse.Namespace) -> int:
    import safetensors.torch
    import torch

    from ..checkpoints import hub
    from ..checkpoints.formats import convert_state_dict, normalise
    from ..checkpoints.load import read_state_dict

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
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            partial = Path(folder) / target.name
            if target.suffix == ".safetensors":
                safetensors.torch.save_file(separate, partial, {"format": "pt"})
            else:
                torch.save(separate, partial)
            os.replace(partial, target)
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        raise OSError(f"{target} cannot be written: {error}") from error
    if arguments.json:
        facts = {"source": arguments.source, "format": file.format, "target": target, "to": arguments.to}
        common.print_json(facts | {"tensors": len(converted), "left_out": file.ignored})
        return 0
    print(f"{arguments.source} ({file.format}) -> {target} ({arguments.to}): {len(converted)} tensors")
    for key in file.ignored:
        print(f"  left out: {key}")
    return 0
