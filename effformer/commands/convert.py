"""Rewrite a checkpoint in another format.

SOURCE is a checkpoint of timm, the original repository (classification or dense) or NetsPresso Trainer;
its keys show which. The suffix of TARGET chooses a safetensors or a torch file.

For example:
  effformer convert efficientformer_l1_1000d.pth l1.safetensors --to timm
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from . import common


def add(commands: common.Commands) -> None:
    parser = common.add_command(commands, "convert", main, __doc__, "TARGET is as it was")
    option = parser.add_argument
    option("source", metavar="SOURCE", help="file, folder, or hub id owner/name")
    option("target", type=Path, metavar="TARGET", help="*.safetensors, *.pth or *.pt")
    option("--to", type=common.one_of("checkpoints.formats", "TARGETS"), default="timm", metavar="NAMING", help="timm, "
           "original, netspresso (the backbone, without heads), or effformer (timm's names, and names for the feature "
           "norms of dense variants); default: %(default)s")  # fmt: skip
    common.add_which(parser)
    option("--force", action="store_true", help="replace TARGET if it exists")
    common.add_json(parser)


def main(arguments: argparse.Namespace) -> int:
    import safetensors.torch
    import torch

    from ..checkpoints import hub
    from ..checkpoints.formats import convert_state_dict, normalise
    from ..checkpoints.read import read_weights
    from ..checkpoints.to_netspresso import without_place
    from ..files import write_whole

    target: Path = arguments.target
    if target.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"TARGET: got {target}, allowed are *.safetensors, *.pth and *.pt")
    if target.exists() and not arguments.force:
        raise FileExistsError(f"{target} exists: --force replaces it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target} cannot be written: {target.parent} is not a folder")
    weights, others = read_weights(hub.locate(arguments.source), arguments.which)
    state = weights.state
    file = normalise(state)
    converted = convert_state_dict(state, arguments.to)
    left_out = [*weights.beside, *file.ignored, *(without_place(file) if arguments.to == "netspresso" else ())]
    separate = {key: value.clone(memory_format=torch.contiguous_format) for key, value in converted.items()}
    if target.suffix == ".safetensors":
        content = safetensors.torch.save(separate, {"format": "pt"})
    else:
        torch.save(separate, file_in_memory := io.BytesIO())
        content = file_in_memory.getvalue()
    write_whole(target, content)
    if arguments.json:
        facts = {"source": arguments.source, "format": file.format, "target": target, "to": arguments.to}
        common.print_json(facts | {"tensors": len(converted), "left_out": left_out, "recomputed": file.recomputed,
                          "taken": weights.name, "others": others})  # fmt: skip
        return 0
    source, written = common.printable(arguments.source), common.printable(target)
    print(f"{source} ({file.format}) -> {written} ({arguments.to}): {len(converted)} tensors")
    for key in left_out:
        print(f"  left out: {key}")
    for remark in file.recomputed:
        print(f"  recomputed: {remark}")
    for name in others:
        print(f"  not taken: {name} (--which)")
    return 0
