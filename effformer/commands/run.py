"""Compute features of images.

Run a network on images. Print the four feature maps, the pooled feature and (with trained weights) the
five likeliest classes of one image, or a line for each of several. Files are written only with
--output FOLDER, which mirrors the tree of a folder of images, or with --beside:
  IMAGE.features.safetensors   stage1..stage4 [C, h, w], pooled [C], logits (with trained weights)
  IMAGE.features.png           the input, the maps' three principal components as colours, and the
                               likeliest class (with trained weights)
Hidden files and folders do not count. An image that cannot be read is reported, the others are used,
and the exit status is 1.

For example:
  effformer run photo.jpg
  effformer run photos/ --checkpoint weights.pth --output features/
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..version import __version__
from . import common

if TYPE_CHECKING:
    import torch

    from ..apps.extract import ImageFeatures


def add(commands: common.Commands) -> None:
    parser = common.add_command(commands, "run", main, __doc__, "the features of finished images are kept")
    option = parser.add_argument
    option("paths", nargs="+", type=Path, metavar="PATH", help="image, or folder of images (recursive)")
    common.add_network(parser, "a file or folder (timm, original or NetsPresso), a hub id owner/name, 'pretrained' "
                       "(timm's ImageNet weights from the hub), 'none' (random weights, seed 0), or 'auto' (the "
                       "default): pretrained if the hub can be reached, else none, with a message", "auto")  # fmt: skip
    common.add_images(parser)
    option("--backend", type=common.one_of("backend", "BACKENDS"), default="auto", help="of the fused "
           "operations: auto, eager or triton; default: %(default)s")  # fmt: skip
    written = parser.add_mutually_exclusive_group()
    written.add_argument("--output", type=Path, metavar="FOLDER", help="write the features and their pictures there; "
                         "with several PATHs, those of a folder below its name")  # fmt: skip
    written.add_argument("--beside", action="store_true", help="write them beside each image")
    option("--labels", type=Path, metavar="FILE", help="class names, one a line, in the order of the network's classes")
    common.add_json(parser)


def main(arguments: argparse.Namespace) -> int:
    import torch

    from ..apps.extract import extract
    from ..apps.images import find_places
    from ..apps.info import describe_backend
    from ..bench.measure.timing import measure

    places = find_places(arguments.paths)
    paths = list(places)
    if not paths:
        raise FileNotFoundError(f"no image below {', '.join(map(str, arguments.paths))}")
    labels = None if arguments.labels is None else common.read_lines("--labels", arguments.labels)
    targets = _targets(places, arguments.output, beside=arguments.beside)
    if targets is None:
        arguments.kept = common.NOT_WRITTEN

    say = common.printer(arguments.json)
    network, preprocessing, facts = common.load_for_images(arguments, arguments.backend, say)
    from tqdm import tqdm

    labels = None if labels is None else common.without_blank_end(labels, network.num_classes)
    if labels is not None and len(labels) != network.num_classes:
        raise ValueError(f"--labels: got {len(labels)} lines, allowed are the network's {network.num_classes} classes")
    has_head = facts["weights"] != "none" and network.num_classes > 0
    device, size, alone = facts["device"], min(arguments.batch_size, len(paths)), len(paths) == 1
    facts |= {"backend": describe_backend(arguments.backend, device)}
    say(f"backend:  {facts['backend']}")
    if not has_head:
        say("top 5:    none, without a classification head that is trained")
    metadata = {"model": facts["model"], "weights": facts["weights"], "effformer": __version__}
    failures: dict[Path, str] = {}
    last, images = None, []
    with tqdm(total=len(paths), unit="image", disable=True if alone else None) as bar:
        for batch, unread in extract(network, paths, preprocessing, size, has_head=has_head):
            failures |= unread
            for features in batch:
                facts_of_image = _facts(features, labels)
                written: tuple[Path, ...] = ()
                if targets is not None:
                    own = {"image": common.printable(features.path.name), **metadata}
                    label = _label(facts_of_image["top5"], named=labels is not None)
                    try:
                        written = features.save(targets[features.path], preprocessing, own, label)
                    except OSError as error:
                        failures[features.path] = str(error)
                        continue
                last = features.x
                if arguments.json:
                    images.append(facts_of_image | {"written": written})
                    continue
                tqdm.write(_describe(features, facts_of_image["top5"], whole=alone))
                if alone and written:
                    tqdm.write("written:  " + ", ".join(map(common.printable, written)))
            bar.update(len(batch) + len(unread))

    if last is not None:
        x = last.to(device, network.stem.conv1.weight.dtype).expand(size, -1, -1, -1)
        timing = measure(torch.no_grad()(lambda: network(x)), device)
        facts |= {"forward_ms_per_image": timing.p50 / size, "batch_size": size}
        say(
            f"time:     {timing.p50 / size:.2f} ms an image (p20 {timing.p20 / size:.2f}, p80 {timing.p80 / size:.2f}; "
            f"forward alone, batch {size}, {timing.repeats} repeats)"
        )
    if arguments.json:
        reasons = {str(path): reason for path, reason in failures.items()}
        common.print_json(facts | {"images": images, "failures": reasons})
    return common.report_failures(failures, len(paths))


def _targets(places: Mapping[Path, Path], output: Path | None, *, beside: bool) -> dict[Path, Path] | None:
    """For each image the path that its files' names begin with; None without an output."""
    if output is None:
        return {path: path for path in places} if beside else None
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"--output: got {output}, which is a file; allowed is a folder, existing or new")
    first: dict[Path, Path] = {}
    for path, place in places.items():
        if (other := first.setdefault(place, path)) is not path:
            raise ValueError(f"--output: {other} and {path} would be written to the same file")
    output.mkdir(parents=True, exist_ok=True)
    return {path: output / place for path, place in places.items()}


def _label(top5: Sequence[dict[str, Any]], *, named: bool) -> str | None:
    """The likeliest class, for a picture."""
    if not top5:
        return None
    name = f": {top5[0]['name']}" if named else ""
    return f"class {top5[0]['class']}{name}  {top5[0]['probability']:.1%}"


def _describe(features: ImageFeatures, top5: Sequence[dict[str, Any]], *, whole: bool) -> str:
    """One line for an image among many, or all lines for a single one."""
    likeliest = [f"{one['probability']:6.2%}  {one['name']}" for one in top5]
    norm, path = features.pooled.float().norm(), common.printable(features.path)
    if not whole:
        return "  ".join([path, f"pooled norm {norm:.4g}", *likeliest[:1]])
    lines = [f"image:    {path}"]
    for index, feature in enumerate(features.maps, 1):
        shape, values = "x".join(map(str, feature.shape)), feature.float()
        lines.append(f"stage {index}:  {shape:<12}mean {values.mean():+.4f}  std {values.std():.4f}")
    lines.append(f"pooled:   {features.pooled.numel():<12}norm {norm:.4f}")
    lines += [f"top {rank}:    {line}" for rank, line in enumerate(likeliest, 1)]
    return "\n".join(lines)


def _facts(features: ImageFeatures, labels: Sequence[str] | None) -> dict[str, Any]:
    """An image's results for --json."""
    return {
        "image": features.path,
        "maps": [feature.shape for feature in features.maps],
        "pooled_norm": features.pooled.float().norm().item(),
        "top5": _top5(features.logits, labels),
    }


def _top5(logits: torch.Tensor | None, labels: Sequence[str] | None) -> list[dict[str, Any]]:
    """The five likeliest classes, by number and name; empty without logits."""
    if logits is None:
        return []
    found = logits.float().softmax(dim=0).topk(min(5, logits.numel()))
    return [
        {"class": index, "name": labels[index] if labels else f"class {index}", "probability": probability}
        for probability, index in zip(found.values.tolist(), found.indices.tolist(), strict=True)
    ]
