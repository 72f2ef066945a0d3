"""Measure accuracy on labelled images.

Measure top-1 and top-5 accuracy on DIR/class/*.jpg, with eager PyTorch and with the Triton kernels (on a
CPU only with TRITON_INTERPRET=1). Report the predictions that differ, and the images per second of the
network alone, without decoding. With --frozen, measure the form that serves, too. The folders, sorted
by name, are the classes 0, 1, ...; each needs an image. Hidden folders and files do not count. An image
that cannot be read is reported, the others are used, and the exit status is 1.

For example:
  effformer eval imagenette2/val --checkpoint pretrained --classes synsets.txt --limit 500
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from . import common


def add(commands: common.Commands) -> None:
    parser = common.add_command(commands, "eval", main, __doc__)
    option = parser.add_argument
    option("folder", type=Path, metavar="DIR", help="holds a folder of images for each class")
    common.add_network(parser, "file, folder, hub id owner/name, or 'pretrained'; with both classification heads")
    common.add_images(parser)
    option("--frozen", action="store_true", help="measure `effformer.freeze(network)` as well, in the same dtype")
    option("--limit", type=common.positive, metavar="N", help="N images, evenly spaced over the dataset")
    option("--classes", type=Path, metavar="FILE", help="folder names, one a line, in the order of the network's "
           "classes; DIR may lack some of them")  # fmt: skip
    common.add_json(parser)


def main(arguments: argparse.Namespace) -> int:
    import torch

    from ..apps.evaluate import TIMED, evaluate, find_labelled
    from ..apps.info import versions

    if arguments.checkpoint in ("auto", "none"):
        raise ValueError(f"--checkpoint: got {arguments.checkpoint!r}, allowed are trained weights")
    classes = None if arguments.classes is None else common.read_lines("--classes", arguments.classes)
    network, preprocessing, facts = common.load_for_images(arguments, "auto", common.printer(arguments.json))
    from tqdm import tqdm

    if not network.num_classes:
        raise ValueError(f"--checkpoint: got {facts['weights']} without classification heads, allowed is one with both")
    classes = None if classes is None else common.without_blank_end(classes, network.num_classes)
    found = find_labelled(arguments.folder, network.num_classes, classes)
    images = found if arguments.limit is None else found.spread(arguments.limit)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's overloads lack it
    with tqdm(total=len(images.paths), unit="image", disable=None) as bar:
        result = evaluate(network, images, preprocessing, batch_size=arguments.batch_size, frozen=arguments.frozen,
                          progress=bar.update)  # fmt: skip

    folders, status = len(set(images.targets)), common.report_failures(result.failures, len(images.paths))
    if arguments.json:
        facts |= {
            "folder": arguments.folder,
            "class_folders": folders,
            "images_found": len(found.paths),
            "ignored": found.ignored,
            "versions": versions(),
            "timed": TIMED,
            **{name: value for name, value in asdict(result).items() if arguments.frozen or "frozen" not in name},
            "failures": {str(path): reason for path, reason in result.failures.items()},
            "changed_share": result.changed_share,
        }
        common.print_json(facts)
        return status
    print(f"images:   {result.images} of {len(found.paths)}, from {folders} class folders")
    if found.ignored:
        first = common.printable(found.ignored[0])
        print(f"ignored:  {len(found.ignored)} files or folders, hidden or without an image's suffix, such as {first}")
    print(result)
    return status
