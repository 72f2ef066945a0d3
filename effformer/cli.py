"""The command `effformer`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from . import hub
from .config import PRESETS
from .dialects import TARGETS, CheckpointError, convert_state_dict, normalise
from .factory import create_model
from .model import EfficientFormer
from .ops import BACKENDS, UnsupportedError
from .outcome import VERDICTS, Outcome, Table, conclusion
from .summary import describe_backend, devices, summarise, versions
from .verification import OPERATIONS, checks, verify, why_not_verified
from .version import __version__
from .weights import load_checkpoint, read_state_dict, settings_for

if TYPE_CHECKING:
    from .extract import ImageFeatures

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 where something could not be read or done, 2 for a wrong call."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except (OSError, ImportError, ValueError, CheckpointError, UnsupportedError) as error:
        print(f"effformer: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="effformer", description="EfficientFormer: features, facts, checkpoints.")
    parser.add_argument("--version", action="version", version=f"effformer {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    formatter = argparse.RawDescriptionHelpFormatter

    run = commands.add_parser(
        "run",
        help="features of images",
        formatter_class=formatter,
        description=(
            "Run a network on images. Print the four feature maps, the pooled feature and (with trained weights) the\n"
            "five likeliest classes of one image, or a line for each of several, and write beside it\n"
            "  IMAGE.features.safetensors   stage1..stage4 [C, h, w], pooled [C], logits (with trained weights)\n"
            "  IMAGE.features.png           the input and the maps' three principal components as colours\n"
            "An image that cannot be read is named, the rest goes on, and the exit status is 1."
        ),
        epilog="examples:\n  effformer run photo.jpg\n"
        "  effformer run photos/ --checkpoint weights.pth --output features/",
    )
    run.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="image, or folder of images (recursive)")
    run.add_argument("--model", choices=PRESETS, help="default: the checkpoint's, or efficientformer_l1")
    run.add_argument(
        "--checkpoint",
        default="auto",
        metavar="WEIGHTS",
        help="a file or folder (timm, original or NetsPresso), a hub id owner/name, 'pretrained' (timm's ImageNet "
        "weights from the hub), 'none' (random weights, seed 0), or 'auto': pretrained if they can be had, else none, "
        "and says so (the default)",
    )
    _add_input_options(run)
    run.add_argument("--backend", choices=BACKENDS, default="auto", help="of the fused operations, default: auto")
    run.add_argument("--output", type=Path, metavar="FOLDER", help="write there instead of beside the images")
    run.add_argument("--labels", type=Path, metavar="FILE", help="class names for the top 5, one a line")
    run.set_defaults(command=_run)

    proof = commands.add_parser(
        "verify",
        help="do the kernels compute what they should?",
        formatter_class=formatter,
        description=(
            "Run the kernels on this machine, each fused operation at the shapes that it has in a network and the\n"
            "network itself, and compare with float64. An error may be twice that of eager PyTorch in the same dtype\n"
            "(its mean 1.5 times) plus 2 ulp of the output's scale; NaN and infinities must stand where float64 has\n"
            "them; further runs must give the same bits. Weights and inputs are random. On a CPU the kernels are\n"
            "interpreted, which takes minutes, and bfloat16 cannot be.\n"
            "Exit status: 0 if kernels ran and all passed, 1 if one failed or raised, or if none can run here."
        ),
        epilog="examples:\n  effformer verify\n"
        "  effformer verify --op meta4d --op network --dtype float16 --size 512x640 --json > report.json",
    )
    proof.add_argument("--model", action="append", choices=[*PRESETS, "all"], help="may be repeated, default: l1")
    proof.add_argument("--op", action="append", choices=[*OPERATIONS, "all"], help="may be repeated, default: all")
    proof.add_argument("--dtype", action="append", choices=[*_DTYPES, "all"], help="may be repeated, default: all")
    proof.add_argument("--size", type=_size, default=(224, 224), metavar="HxW", help="of the images, default: 224x224")
    proof.add_argument("--batch-size", type=_positive, metavar="N", help="default: 8 on a GPU, 2 on a CPU")
    proof.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    proof.add_argument("--seed", type=_count, default=0, metavar="N", help="of all that is drawn, default: 0")
    proof.add_argument("--repeats", type=_count, metavar="N", help="further runs that must give the same "
                       "bits; default: 3 on a GPU, 0 on a CPU, where programs run one after another")  # fmt: skip
    proof.add_argument("--json", action="store_true", help="one JSON document on stdout, for programs")
    proof.set_defaults(command=_verify)

    evaluate = commands.add_parser(
        "eval",
        help="accuracy on labelled images",
        formatter_class=formatter,
        description=(
            "Top-1 and top-5 on DIR/class/*.jpg, with eager PyTorch and with Triton (on a CPU with TRITON_INTERPRET=1\n"
            "alone), the predictions that differ between both, and images per second of the network alone, on batches\n"
            "that lie on the device. The folders, sorted by name, are the classes 0, 1, ...; every folder and every\n"
            "image counts. An image that cannot be read is named, the rest goes on, and the exit status is 1."
        ),
        epilog="example:\n  effformer eval imagenette2/val --checkpoint pretrained --classes synsets.txt --limit 500",
    )
    evaluate.add_argument("folder", type=Path, metavar="DIR", help="holds a folder of images for each class")
    evaluate.add_argument("--model", choices=PRESETS, help="default: the checkpoint's, or efficientformer_l1")
    evaluate.add_argument("--checkpoint", required=True, metavar="WEIGHTS", help="file, folder, hub id owner/name, or "
                          "'pretrained'; with classification heads")  # fmt: skip
    _add_input_options(evaluate)
    evaluate.add_argument("--limit", type=_positive, metavar="N", help="N images, evenly spaced over the dataset")
    evaluate.add_argument("--classes", type=Path, metavar="FILE", help="folder names, one a line, in the order of the "
                          "network's classes; DIR may lack some of them")  # fmt: skip
    evaluate.add_argument("--json", action="store_true", help="for programs")
    evaluate.set_defaults(command=_eval)

    info = commands.add_parser(
        "info",
        help="models, versions, devices, backend",
        description="The models' parameters, multiply-accumulates and feature maps at an image size; versions; "
        "devices, and the backend that each would take and why.",
    )
    info.add_argument("--size", type=_size, default=(224, 224), metavar="HxW", help="default: 224x224")
    info.add_argument("--json", action="store_true", help="for programs")
    info.set_defaults(command=_info)

    convert = commands.add_parser(
        "convert",
        help="checkpoint formats",
        formatter_class=formatter,
        description="Convert a checkpoint of timm, the original repository (classification or dense) or NetsPresso\n"
        "Trainer, told apart by their keys. The target is a safetensors or a torch file, by its suffix.",
        epilog="example:\n  effformer convert efficientformer_l1_1000d.pth l1.safetensors --to timm",
    )
    convert.add_argument("source", metavar="SOURCE", help="file, folder, or hub id owner/name")
    convert.add_argument("target", type=Path, metavar="TARGET", help="*.safetensors, *.pth or *.pt")
    convert.add_argument("--to", choices=TARGETS, default="timm", help="naming; 'effformer' is timm's, and has room "
                         "for the dense variants' feature norms; default: %(default)s")  # fmt: skip
    convert.add_argument("--force", action="store_true", help="replace TARGET if it exists")
    convert.set_defaults(command=_convert)
    return parser


def _add_input_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=_size, metavar="HxW", help="input size, default: the checkpoint's, or 224x224")
    parser.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="default: %(default)s")


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return _positive(height), _positive(width or height)


def _positive(text: str) -> int:
    if not _is_number(text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is a whole number of 1 or more")
    return int(text)


def _count(text: str) -> int:
    if not _is_number(text):
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is a whole number of 0 or more")
    return int(text)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


# --- run --------------------------------------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace) -> int:
    try:
        from tqdm import tqdm

        from .extract import Extraction
        from .images import Preprocessing, default_workers, find_images
    except ImportError as error:
        raise ImportError(f"{error}: install effformer[image] to run on images") from error
    from .bench.timing import measure

    paths = find_images(arguments.paths)
    if not paths:
        raise FileNotFoundError(f"no image below {', '.join(map(str, arguments.paths))}")
    labels = None if arguments.labels is None else _read_lines("--labels", arguments.labels)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        _refuse_collisions(paths)

    device = _device(arguments.device)
    network, name, hub_config, weights = _network(arguments.model, arguments.checkpoint, arguments.backend)
    network = network.to(device, _DTYPES[arguments.dtype]).eval()
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


def _device(name: str) -> torch.device:
    known = devices()
    chosen = {"auto": "cuda:0" if "cuda:0" in known else "cpu", "cuda": "cuda:0"}.get(name, name)
    if chosen not in known:
        raise ValueError(f"--device: got {name!r}, allowed are auto, {', '.join(known)}")
    return torch.device(chosen)


def _network(name: str | None, checkpoint: str, backend: str) -> tuple[EfficientFormer, str, dict[str, Any], str]:
    """(network, its name, the checkpoint's config.json, what its weights are: "none" if random)."""
    torch.manual_seed(0)
    fallback = name or "efficientformer_l1"
    if checkpoint == "none":
        return create_model(fallback, backend=backend), fallback, {}, "none"
    source = hub.PRETRAINED[fallback] if checkpoint in ("auto", "pretrained") else checkpoint
    try:
        if checkpoint == "auto":
            print(f"looking for {source} (--checkpoint none skips this) ...", flush=True)
        path = hub.locate(source)
    except (ImportError, OSError) as error:
        if checkpoint != "auto":
            raise
        print(f"no trained weights: {str(error).splitlines()[0]}")
        return create_model(fallback, backend=backend), fallback, {}, "none"
    try:
        hub_config = hub.read_config(source)
    except OSError:
        print("its config.json cannot be had: images are prepared as for the published weights")
        hub_config = {}
    _, state = read_state_dict(path)
    found, settings = settings_for(state)
    if name not in (None, found):
        raise ValueError(f"--model: got {name}, allowed is {found} with this checkpoint")
    network = create_model(found, backend=backend, **settings)
    report = load_checkpoint(network, state)
    print(f"loaded:   {path} ({report.format})")
    for what in ("ignored", "reinitialised", "cast"):
        if entries := getattr(report, what):
            print(f"  {what}: {', '.join(entries)}")
    return network, found, hub_config, source


def _read_lines(option: str, path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: {path} is not UTF-8 text ({error})") from error


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


# --- verify -----------------------------------------------------------------------------------------------------------


def _verify(arguments: argparse.Namespace) -> int:
    device = _device(arguments.device)
    if device.type == "cpu" and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
    on_gpu = device.type == "cuda"
    batch_size = arguments.batch_size or (8 if on_gpu else 2)
    repeats = arguments.repeats if arguments.repeats is not None else 3 if on_gpu else 0
    todo = checks(
        _chosen(arguments.model, PRESETS, ["efficientformer_l1"]),
        _chosen(arguments.op, OPERATIONS, OPERATIONS),
        [_DTYPES[name] for name in _chosen(arguments.dtype, _DTYPES, _DTYPES)],
        size=arguments.size,
        batch_size=batch_size,
    )
    reason, table = why_not_verified(device), Table(todo)
    facts: dict[str, Any] = {
        "versions": versions(),
        "device": str(device),
        "device_name": devices()[str(device)],
        "interpreted": reason is None and not on_gpu,
        "backend": describe_backend("auto", device),
        "size": [*arguments.size],
        "batch_size": batch_size,
        "seed": arguments.seed,
        "repeats": repeats,
    }
    if not arguments.json:
        height, width = arguments.size
        print("  ".join(f"{name} {version}" for name, version in versions().items()))
        print(f"device:   {device} ({facts['device_name']}){', by interpretation' if facts['interpreted'] else ''}")
        print(f"backend:  {facts['backend']}; verified here: {'none' if reason else 'triton'}")
        print(f"input:    {batch_size}x3x{height}x{width}, seed {arguments.seed}, {repeats} further runs\n")
        if reason is None:
            print(table.head())
    outcomes = []
    followed, write = _followed(verify(todo, device, seed=arguments.seed, repeats=repeats), len(todo))
    for outcome in followed:
        outcomes.append(outcome)
        if not arguments.json and not outcome.skipped:
            write(table.line(outcome))

    counts = {verdict: sum(outcome.verdict == verdict for outcome in outcomes) for verdict in VERDICTS}
    passed = counts["pass"] > 0 and counts["fail"] == 0
    if arguments.json:
        facts |= {"passed": passed, "counts": counts, "why_no_kernel": reason}
        facts["checks"] = [outcome.facts() for outcome in outcomes]
        print(json.dumps(facts, indent=2, allow_nan=False))
    else:
        if reason is None:
            print()
        print("\n".join(conclusion(outcomes)))
    return 0 if passed else 1


def _chosen(named: list[str] | None, allowed: Iterable[str], default: Iterable[str]) -> list[str]:
    """What an option that may be repeated, or be "all", stands for."""
    return [*default] if named is None else [*allowed] if "all" in named else named


def _followed(outcomes: Iterator[Outcome], total: int) -> tuple[Iterable[Outcome], Callable[[str], object]]:
    """`outcomes` with a bar where tqdm is installed and stderr is a terminal, and what prints beside it."""
    try:
        from tqdm import tqdm
    except ImportError:  # it belongs to the extra `image`
        return outcomes, print
    return tqdm(outcomes, total=total, unit="check", disable=None, leave=False), tqdm.write


# --- eval -------------------------------------------------------------------------------------------------------------


def _eval(arguments: argparse.Namespace) -> int:
    try:
        from tqdm import tqdm

        from .evaluation import TIMED, evaluate, find_labelled
        from .images import Preprocessing
    except ImportError as error:
        raise ImportError(f"{error}: install effformer[image] to evaluate on images") from error

    if arguments.checkpoint in ("auto", "none"):
        raise ValueError(f"--checkpoint: got {arguments.checkpoint!r}, allowed are trained weights")
    classes = None if arguments.classes is None else _read_lines("--classes", arguments.classes)
    device = _device(arguments.device)
    with contextlib.redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        network, name, hub_config, weights = _network(arguments.model, arguments.checkpoint, "auto")
    if not network.num_classes:
        raise ValueError(f"--checkpoint: got {weights} without classification heads, allowed is one that has both")
    found = find_labelled(arguments.folder, network.num_classes, classes)
    images = found if arguments.limit is None else found.spread(arguments.limit)
    network = network.to(device, _DTYPES[arguments.dtype]).eval()
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


# --- info -------------------------------------------------------------------------------------------------------------


def _info(arguments: argparse.Namespace) -> int:
    height, width = arguments.size
    models = [summarise(name, height, width) for name in PRESETS]
    backends = {name: describe_backend("auto", torch.device(name)) for name in devices()}
    if arguments.json:
        facts = {
            "versions": versions(),
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
    print(f"\n{'model':<20}{'parameters':>12}{'MACs':>10}   feature maps of an image of {height}x{width}")
    for model in models:
        maps = "  ".join("x".join(map(str, shape)) for shape in model.features)
        print(f"{model.name:<20}{model.parameters / 1e6:>10.2f} M{model.macs / 1e9:>8.2f} G   {maps}")
    return 0


# --- convert ----------------------------------------------------------------------------------------------------------


def _convert(arguments: argparse.Namespace) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
