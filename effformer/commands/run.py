"""`effformer run`: features of images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..apps.info import describe_backend, devices
from ..version import __version__
from .common import DTYPES, network_of, read_lines, torch_device

if TYPE_CHECKING:
    from ..apps.extract import ImageFeatures


def main(arguments: argparse.Namespace) -> int:
    try:
        from tqdm import tqdm

        from ..apps.extract import Extraction
        from ..apps.images import Preprocessing, default_workers, find_images
    except ImportError as error:
        raise ImportError(f"{error}: install effformer[image] to run on images") from error
    from ..bench.measure.timing import measure

    paths = find_images(arguments.paths)
    if not paths:
        raise FileNotFoundError(f"no image below {', '.join(map(str, arguments.paths))}")
    labels = None if arguments.labels is None else read_lines("--labels", arguments.labels)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        _refuse_collisions(paths)

    device = torch_device(arguments.device)
    network, name, hub_config, weights = network_of(arguments.model, arguments.checkpoint, arguments.backend)
    network = network.to(device, DTYPES[arguments.dtype]).eval()
    preprocessing = Preprocessing.from_config(hub_config)
    if arguments.size is not None:
        preprocessing = replace(preprocessing, size=arguments.size)
    if labels is not None and len(labels) != network.num_classes:
        raise ValueError(f"--labels: got {len(labels)} lines, allowed are the network's {network.num_classes} classes")
    has_head = weights != "none" and network.num_classes > 0

    print(f"model:    {name}, weights: {_describe_weights(weights, has_head)}")
    print(f"backend:  {describe_backend(arguments.backend, device)}")
    print(f"device:   {device} ({devices()[str(device)]}), {arguments.dtype}")
    height, width = preprocessing.size
    print(f"input:    {height}x{width}, {preprocessing.interpolation}, centre crop {preprocessing.crop_pct}")
    extraction = Extraction(
        network,
        paths,
        preprocessing,
        batch_size=min(arguments.batch_size, len(paths)),
        workers=default_workers(),
        has_head=has_head,
    )
    metadata = {"model": name, "weights": weights, "effformer": __version__}
    last: ImageFeatures | None = None
    with tqdm(total=len(paths), unit="image", disable=len(paths) == 1) as bar:
        for batch in extraction:
            for features in batch:
                try:
                    written = features.save(arguments.output, preprocessing, metadata)
                except OSError as error:
                    extraction.failures[features.path] = str(error)
                    continue
                tqdm.write(_describe(features, labels, whole=len(paths) == 1))
                if len(paths) == 1:
                    tqdm.write("written:  " + ", ".join(map(str, written)))
                last = features
            bar.update(min(extraction.batch_size, len(paths) - bar.n))

    if last is not None:
        size = extraction.batch_size
        timing = measure(extraction.forward_of(last.path), device)
        print(
            f"time:     {timing.p50 / size:.2f} ms an image (p20 {timing.p20 / size:.2f}, p80 {timing.p80 / size:.2f}; "
            f"forward alone, batch {size}, {timing.repeats} repeats)"
        )
    for path, reason in extraction.failures.items():
        print(f"effformer: {path}: {reason}", file=sys.stderr)
    if extraction.failures:
        print(f"effformer: {len(extraction.failures)} of {len(paths)} images failed", file=sys.stderr)
    return 1 if extraction.failures else 0


def _refuse_collisions(paths: Sequence[Path]) -> None:
    names: dict[str, Path] = {}
    for path in paths:
        if (other := names.setdefault(path.name, path)) is not path:
            raise ValueError(f"--output: {other} and {path} would be written to the same file")


def _describe_weights(weights: str, has_head: bool) -> str:
    if weights == "none":
        return "random (seed 0): the features mean nothing, and there is no top 5"
    return weights if has_head else f"{weights} (without a classification head: there is no top 5)"


def _describe(features: ImageFeatures, labels: Sequence[str] | None, *, whole: bool) -> str:
    """One line for an image among many, or all that there is to say of a single one."""
    likeliest = [] if features.logits is None else _top5(features.logits, labels)
    norm = f"pooled norm {features.pooled.float().norm():.4g}"
    if not whole:
        return "  ".join([str(features.path), norm, *likeliest[:1]])
    lines = [f"image:    {features.path}"]
    for index, feature in enumerate(features.maps, 1):
        shape, values = "x".join(map(str, feature.shape)), feature.float()
        lines.append(f"stage {index}:  {shape:<12}mean {values.mean():+.4f}  std {values.std():.4f}")
    lines.append(f"pooled:   {features.pooled.numel():<12}norm {features.pooled.float().norm():.4f}")
    lines += [f"top {rank}:    {line}" for rank, line in enumerate(likeliest, 1)]
    return "\n".join(lines)


def _top5(logits: torch.Tensor, labels: Sequence[str] | None) -> list[str]:
    probabilities, classes = logits.float().softmax(dim=0).topk(min(5, logits.numel()))
    names = [f"class {index}" if labels is None else labels[index] for index in classes.tolist()]
    return [f"{probability:6.2%}  {name}" for probability, name in zip(probabilities.tolist(), names, strict=True)]
