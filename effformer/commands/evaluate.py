"""`effformer eval`: accuracy on labelled images."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import asdict, replace

import torch

from ..apps.info import devices, versions
from .common import DTYPES, network_of, read_lines, torch_device


def main(arguments: argparse.Namespace) -> int:
    try:
        from tqdm import tqdm

        from ..apps.evaluate import TIMED, evaluate, find_labelled
        from ..apps.images import Preprocessing
    except ImportError as error:
        raise ImportError(f"{error}: install effformer[image] to evaluate on images") from error

    if arguments.checkpoint in ("auto", "none"):
        raise ValueError(f"--checkpoint: got {arguments.checkpoint!r}, allowed are trained weights")
    classes = None if arguments.classes is None else read_lines("--classes", arguments.classes)
    device = torch_device(arguments.device)
    with contextlib.redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        network, name, hub_config, weights = network_of(arguments.model, arguments.checkpoint, "auto")
    if not network.num_classes:
        raise ValueError(f"--checkpoint: got {weights} without classification heads, allowed is one that has both")
    found = find_labelled(arguments.folder, network.num_classes, classes)
    images = found if arguments.limit is None else found.spread(arguments.limit)
    network = network.to(device, DTYPES[arguments.dtype]).eval()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's overloads lack it
    preprocessing = Preprocessing.from_config(hub_config)
    if arguments.size is not None:
        preprocessing = replace(preprocessing, size=arguments.size)
    with tqdm(total=len(images.paths), unit="image") as bar:
        result = evaluate(network, images, preprocessing, batch_size=arguments.batch_size, progress=bar.update)

    for path, reason in result.failures.items():
        print(f"effformer: {path}: {reason}", file=sys.stderr)
    if result.failures:
        print(f"effformer: {len(result.failures)} of {len(images.paths)} images failed", file=sys.stderr)
    facts = {
        "model": name,
        "weights": weights,
        "device": str(device),
        "device_name": devices()[str(device)],
        "dtype": arguments.dtype,
        "size": list(preprocessing.size),
        "folder": str(arguments.folder),
        "class_folders": images.folders,
        "images_found": len(found.paths),
        "ignored": list(map(str, found.ignored)),
        "versions": versions(),
        "timed": TIMED,
        **asdict(result),
        "failures": {str(path): reason for path, reason in result.failures.items()},
        "changed_share": result.changed_share,
    }
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 1 if result.failures else 0
    height, width = preprocessing.size
    print(f"model:    {name}, weights: {weights}")
    print(f"device:   {device} ({facts['device_name']}), {arguments.dtype}")
    print(f"input:    {height}x{width}, {preprocessing.interpolation}, centre crop {preprocessing.crop_pct}")
    print(f"images:   {result.images} of {len(found.paths)}, from {images.folders} class folders")
    if found.ignored:
        print(f"ignored:  {len(found.ignored)} files that are no images by their names, as {found.ignored[0]}")
    print(result)
    return 1 if result.failures else 0
