"""Shared by the commands: kinds of options, the device, the network of a checkpoint, output for programs.

Nothing here imports torch before it is needed: `--help` and `--version` answer at once.
"""

from __future__ import annotations

import argparse
import codecs
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..checks import first_line
from ..config import LEAST_SIDE, PRESETS
from ..extras import install

if TYPE_CHECKING:
    import torch

    from ..apps.images import Preprocessing
    from ..model.network import EfficientFormer

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Type: TypeAlias = Callable[[str], str]
DTYPES = {"float32": ("fp32", "float"), "bfloat16": ("bf16",), "float16": ("fp16", "half")}  # name -> short names
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip  # in this order: the mark of UTF-32 begins with that of UTF-16
_SHOWN = 8  # keys of a checkpoint in a line
NOT_WRITTEN = "no file was written"  # said after Ctrl-C, as the next
RESUMES = "finished measurements are kept, the same command goes on"


# --- options ----------------------------------------------------------------------------------------------------------


def add_command(
    commands: Commands,
    name: str,
    main: Callable[[argparse.Namespace], int],
    doc: str | None,
    kept: str = NOT_WRITTEN,
) -> argparse.ArgumentParser:
    """Add a command that `main` runs.

    `doc` is its module's docstring: the first line stands in the list of commands, the rest above its options. `kept`
    says what remains after Ctrl-C.
    """
    summary, _, description = (doc or name).partition("\n")
    parser = commands.add_parser(
        name,
        help=summary[0].lower() + summary[1:].rstrip("."),
        description=f"{summary}\n{description}".strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(main=main, kept=kept)
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: the first GPU, or the CPU")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document; messages go to stderr")


def add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=size, default=(224, 224), metavar="HxW", help="of the images; default: 224x224")


def add_network(parser: argparse.ArgumentParser, checkpoint: str, default: str | None = None) -> None:
    """Add --model, --which, and --checkpoint, which `checkpoint` describes and which is required without a default."""
    parser.add_argument("--model", type=model, help="l1, l3 or l7; default: the checkpoint's, or l1")
    parser.add_argument("--checkpoint", default=default, required=default is None, metavar="WEIGHTS", help=checkpoint)
    add_which(parser)


def add_which(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--which", metavar="NAME", help="the weights to take from a file with several, by entry or "
                        "prefix: model, model_ema, teacher; default: averaged ones, else the first")  # fmt: skip


def add_images(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that reads image files."""
    parser.add_argument("--size", type=size, metavar="HxW", help="input size; default: the checkpoint's, or 224x224")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--dtype", type=dtype, default="float32", help="fp32, bf16 or fp16; default: fp32")
    add_device(parser)


def model(text: str) -> str:
    """An argparse type: the name of a published model, or its end."""
    return _meant(text, {name.removeprefix("efficientformer_"): name for name in PRESETS} | {n: n for n in PRESETS})


def dtype(text: str) -> str:
    """An argparse type: a dtype's name as torch spells it, from that or a short one."""
    return _meant(text, {spelling: name for name, short in DTYPES.items() for spelling in (name, *short)})


def one_of(module: str, names: str, *others: str) -> Type:
    """An argparse type: one of `others`, or of `names` in `effformer.<module>`, imported when a value comes."""

    def choice(text: str) -> str:
        allowed = *getattr(importlib.import_module(f"effformer.{module}"), names), *others
        return _meant(text, dict(zip(allowed, allowed, strict=True)))

    return choice


def target(text: str) -> str:
    """An argparse type: a GPU that kernels are compiled for, as "sm_90"."""
    from ..kernels.tiling.device import TARGETS

    return _meant(text, {f"sm_{capability}": f"sm_{capability}" for capability in TARGETS})


def or_all(kind: Type) -> Type:
    """An argparse type: what `kind` takes, or "all"."""
    return lambda text: text if text == "all" else kind(text)


def size(text: str) -> tuple[int, int]:
    """An argparse type: HxW, or one side for both."""
    height, cross, width = text.partition("x")
    sides = [int(side) if _is_number(side) else 0 for side in (height, width if cross else height)]
    if min(sides) < LEAST_SIDE:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is HxW, or one side, of {LEAST_SIDE} pixels or more")
    return sides[0], sides[1]


def count(text: str, least: int = 0) -> int:
    """An argparse type: a whole number of `least` or more."""
    if not _is_number(text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is a whole number of {least} or more")
    return int(text)


def positive(text: str) -> int:
    """An argparse type: a whole number of 1 or more."""
    return count(text, 1)


def minutes(text: str) -> float:
    """An argparse type: a number of minutes above 0, as many as the user likes."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed is a number of minutes above 0")
    return value


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _meant(text: str, allowed: Mapping[str, str]) -> str:
    if text not in allowed:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed are {', '.join(allowed)}")
    return allowed[text]


# --- output -----------------------------------------------------------------------------------------------------------


def printer(as_json: bool) -> Callable[[str], None]:
    """A function that prints messages for people: on stdout, or on stderr if stdout is for a JSON document."""
    return lambda line: print(line, file=sys.stderr if as_json else sys.stdout, flush=True)


def print_json(facts: dict[str, Any]) -> None:
    """Print `facts`: names for paths, devices and dtypes, null for NaN and infinities, which JSON does not have."""
    text = json.dumps(facts, default=lambda value: str(value).removeprefix("torch."))
    print(json.dumps(json.loads(text, parse_constant=lambda constant: None), indent=2))


def report_failures(failures: Mapping[Path, str], total: int) -> int:
    """Print the reason of each image that failed, of `total`; returns the exit status."""
    for path, reason in failures.items():
        print(f"effformer: {printable(path)}: {printable(reason)}", file=sys.stderr)
    if failures:
        print(f"effformer: {len(failures)} of {total} images failed", file=sys.stderr)
    return 1 if failures else 0


def printable(text: str | Path) -> str:
    """A name as one line of text: control characters, and bytes of a file's name that are not UTF-8, become escapes."""

    def escaped(character: str) -> str:
        byte = ord(character) - 0xDC00  # as Python decodes it
        return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else ascii(character)[1:-1]

    return "".join(each if each.isprintable() else escaped(each) for each in str(text))


def read_lines(option: str, path: Path) -> list[str]:
    """The lines of a text file: UTF-8, or UTF-16 or UTF-32 with a byte order mark, with line ends of any system.

    Raises:
        OSError: where the file cannot be read.
        ValueError: naming `option`, for other content.
    """
    content = path.read_bytes()
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: {path} is not {encoding.upper()} text ({error}): save it as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{option}: {path} holds NUL, as UTF-16 without a byte order mark does: save it as UTF-8")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def without_blank_end(lines: list[str], count: int) -> list[str]:
    """Lines of which `count` are wanted, without blank ones at the end that are too many."""
    blank = next((number for number, line in enumerate(reversed(lines)) if line.strip()), len(lines))
    return lines[: max(count, len(lines) - blank)]


# --- torch ------------------------------------------------------------------------------------------------------------


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of an entry of `DTYPES`."""
    import torch

    return getattr(torch, name)


def torch_device(name: str) -> torch.device:
    """The device that --device names.

    Raises:
        ValueError: for a device that this machine does not have, with the reason where torch finds no GPU at all.
    """
    import torch

    from ..apps.info import devices, why_no_gpu

    known = devices()
    chosen = {"auto": "cuda:0" if "cuda:0" in known else "cpu", "cuda": "cuda:0"}.get(name, name)
    if chosen not in known:
        reason = "" if "cuda:0" in known else f" ({why_no_gpu()})"
        raise ValueError(f"--device: got {name!r}, allowed are auto, {', '.join(known)}{reason}")
    return torch.device(chosen)


def execute_on_cpu() -> None:
    """Prepare a process for kernels that are compiled for the GPU of --target and executed on the CPU.

    Tensors stay on the CPU: it must be called before torch looks for GPUs.

    Raises:
        ValueError: in a process that interprets.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET: got 1 with --target, allowed is a process that compiles")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def load_network(
    name: str | None,
    checkpoint: str,
    backend: str,
    say: Callable[[str], object] = print,
    which: str | None = None,
) -> tuple[EfficientFormer, str, dict[str, Any], str]:
    """Build the network of --model and --checkpoint, and load its weights (`which`, if there are several).

    Returns:
        the network, its name, the checkpoint's `config.json`, and the source of the weights: "none" if random.
    """
    import torch

    from ..checkpoints import config_file, hub
    from ..checkpoints.load import load_checkpoint, network_of
    from ..factory import create_model

    if which is not None and checkpoint in ("auto", "none", "pretrained"):
        raise ValueError(f"--which: got {which!r} with --checkpoint {checkpoint}, allowed is a file of your own")
    torch.manual_seed(0)
    path, fallback = None, name or "efficientformer_l1"
    source = hub.PRETRAINED[fallback] if checkpoint in ("auto", "pretrained") else checkpoint
    try:
        if checkpoint == "auto":
            say(f"looking for {source} (--checkpoint none skips this) ...")
        if checkpoint != "none":
            path = hub.locate(source)
    except (ImportError, OSError) as error:
        if checkpoint != "auto":
            raise
        say(f"no trained weights: {first_line(error)}")
    if path is None:
        say(f"model:    {fallback}, weights: random (seed 0)")
        return create_model(fallback, backend=backend), fallback, {}, "none"
    try:
        hub_config = hub.read_config(source)
    except OSError:
        say("its config.json cannot be read: images are prepared as for the published weights")
        hub_config = {}
    found, keywords = network_of(source, which)
    network = create_model(found, backend=backend, **keywords)
    found = config_file.name_of(network.config)
    if name not in (None, found):
        raise ValueError(f"--model: got {name}, allowed is {found} with this checkpoint")
    report = load_checkpoint(network, path, which=which)
    taken = "".join(f", {part}" for part in (report.container, report.prefix) if part)
    say(f"loaded:   {path} ({report.format}{taken})")
    for part in ("ignored", "reinitialised", "cast", "recomputed", "others"):
        if entries := getattr(report, part):
            more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
            say(f"  {part}: {', '.join(entries[:_SHOWN])}{more}")
    say(f"model:    {found}, weights: {source}")
    return network, found, hub_config, source


def load_for_images(
    arguments: argparse.Namespace, backend: str, say: Callable[[str], object]
) -> tuple[EfficientFormer, Preprocessing, dict[str, Any]]:
    """Load the network of a command with `add_network` and `add_images`, onto its device and in eval mode.

    Returns:
        the network, the preparation of its images, and facts about both for --json.

    Raises:
        ImportError: without the extra `image`.
    """
    try:
        import PIL  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}; to read images: {install('image')}") from error
    from ..apps.images import Preprocessing
    from ..apps.info import devices

    device = torch_device(arguments.device)
    network, name, hub_config, weights = load_network(
        arguments.model, arguments.checkpoint, backend, say, arguments.which
    )
    prepare = Preprocessing.from_config(hub_config)
    prepare = replace(prepare, size=arguments.size or prepare.size)
    (height, width), described = prepare.size, devices()[str(device)]
    say(f"device:   {device} ({described}), {arguments.dtype}")
    say(f"input:    {height}x{width}, {prepare.interpolation}, centre crop {prepare.crop_pct}")
    facts = {"model": name, "weights": weights, "device": device, "device_name": described, "dtype": arguments.dtype}
    return network.to(device, torch_dtype(arguments.dtype)).eval(), prepare, facts | {"size": prepare.size}
