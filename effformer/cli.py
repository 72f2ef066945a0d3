"""The command `effformer`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from .apps.verify import OPERATIONS
from .checkpoints.formats import TARGETS, CheckpointError
from .commands.common import DTYPES
from .config import PRESETS
from .ops import BACKENDS, UnsupportedError
from .serving.export import BACKENDS as EXPORT_BACKENDS
from .serving.export import FORMATS, ExportError
from .serving.packing import OUTPUTS
from .version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 where something could not be read or done, 2 for a wrong call."""
    argv = [*(sys.argv[1:] if argv is None else argv)]
    if argv[:1] == ["bench"] and _means_run(argv[1:2]):
        argv.insert(1, "run")
    arguments = _parser().parse_args(argv)
    try:
        status: int = importlib.import_module(f".commands.{arguments.command}", __package__).main(arguments)
    except (OSError, ImportError, ValueError, CheckpointError, UnsupportedError, ExportError) as error:
        print(f"effformer: error: {error}", file=sys.stderr)
        return 1
    return status


def _means_run(first: Sequence[str]) -> bool:
    """Whether what follows `bench` is no subcommand, and no question for those."""
    return not first or (first[0].startswith("-") and first[0] not in ("-h", "--help"))


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
    run.set_defaults(command="run")

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
    proof.add_argument("--dtype", action="append", choices=[*DTYPES, "all"], help="may be repeated, default: all")
    proof.add_argument("--size", type=_size, default=(224, 224), metavar="HxW", help="of the images, default: 224x224")
    proof.add_argument("--batch-size", type=_positive, metavar="N", help="default: 8 on a GPU, 2 on a CPU")
    proof.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    proof.add_argument("--seed", type=_count, default=0, metavar="N", help="of all that is drawn, default: 0")
    proof.add_argument("--repeats", type=_count, metavar="N", help="further runs that must give the same "
                       "bits; default: 3 on a GPU, 0 on a CPU, where programs run one after another")  # fmt: skip
    proof.add_argument("--json", action="store_true", help="one JSON document on stdout, for programs")
    proof.set_defaults(command="verify")

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
    evaluate.set_defaults(command="evaluate")

    bench = commands.add_parser(
        "bench",
        help="how fast is it, beside timm's? search for the fastest tiles",
        formatter_class=formatter,
        description="Measure on this machine. `effformer bench [options]` is `effformer bench run [options]`.",
    ).add_subparsers(required=True, metavar="COMMAND")
    _add_bench_run(bench)
    _add_bench_kernels(bench)
    _add_bench_report(bench)
    tune = bench.add_parser(
        "tune",
        help="search for the fastest tiles on this GPU",
        formatter_class=formatter,
        description=(
            "Time the kernels with other tiles than the table's, at the shapes that they have in a network, and write\n"
            "the fastest down. Tiles that spill, leave the tensor cores, or take more shared memory than there is are\n"
            "not run; what runs must be accurate and give the same bits each time. An outcome is kept as soon as it\n"
            "is there: the same command goes on where it stopped.\n"
            "Exit status: 0 when all is tuned, 75 when the time was over first, 1 if tiles of the table failed."
        ),
        epilog="example:\n  effformer bench tune --model efficientformer_l3 --dtype bfloat16 --batch-size 256 1",
    )
    tune.add_argument("--model", nargs="+", choices=PRESETS, default=["efficientformer_l1"], help="default: l1")
    tune.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16", "float16"], help="default: both of 16 "
                      "bit")  # fmt: skip
    tune.add_argument("--batch-size", nargs="+", type=_positive, default=[256, 1], metavar="N", help="default: 256 1")
    tune.add_argument("--size", type=_size, default=(224, 224), metavar="HxW", help="of the images, default: 224x224")
    tune.add_argument("--device", default="auto", help="cuda, cuda:1, ...; default: cuda")
    tune.add_argument("--minutes", type=_minutes, default=9.0, metavar="M", help="up to 10, of all this command takes; "
                      "default: %(default)s")  # fmt: skip
    tune.add_argument("--in-place", nargs="?", const="", metavar="FILE", help="write into a table for every card of "
                      "this class, the shipped one or FILE, instead of the file of this user and card")  # fmt: skip
    tune.add_argument("--workers", type=_positive, metavar="N", help="processes that compile; default: one for each "
                      "core, 16 at most")  # fmt: skip
    tune.set_defaults(command="tune")

    info = commands.add_parser(
        "info",
        help="models, versions, devices, backend",
        description="The models' parameters, multiply-accumulates and feature maps at an image size; versions; "
        "devices, and the backend that each would take and why.",
    )
    info.add_argument("--size", type=_size, default=(224, 224), metavar="HxW", help="default: 224x224")
    info.add_argument("--json", action="store_true", help="for programs")
    info.set_defaults(command="info")

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
    convert.set_defaults(command="convert")
    _add_export(commands)
    return parser


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = commands.add_parser(
        "export",
        help="a file for torch.export, AOTInductor or ONNX",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Write the network, folded, to a file that runs without its Python code, for batches of any size:\n"
            "  pt2    a graph for torch.export.load\n"
            "  aoti   compiled code for torch._inductor.aoti_load_package and C++; half a minute or more to compile,\n"
            "         with --dynamic-size minutes\n"
            "  onnx   for onnxruntime and others\n"
            "The file is loaded again and must be as accurate as eager PyTorch, beside float64; else none is written."
        ),
        epilog="examples:\n  effformer export l1.onnx --format onnx --checkpoint pretrained\n"
        "  effformer export l1.pt2 --format aoti --checkpoint weights.pth --size 512x640 --output features",
    )
    export.add_argument("target", type=Path, metavar="TARGET", help="*.pt2, or *.onnx")
    export.add_argument("--format", choices=FORMATS, default="pt2", help="default: %(default)s")
    export.add_argument("--model", choices=PRESETS, help="default: the checkpoint's, or efficientformer_l1")
    export.add_argument("--checkpoint", required=True, metavar="WEIGHTS", help="file, folder, hub id owner/name, "
                        "'pretrained', or 'none' (random weights, seed 0)")  # fmt: skip
    export.add_argument("--output", choices=OUTPUTS, default="logits", help="default: %(default)s")
    export.add_argument("--size", type=_size, default=(224, 224), metavar="HxW", help="of the images, default: 224x224")
    export.add_argument("--dynamic-size", action="store_true", help="leave their sides free, from 33 on")
    export.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    export.add_argument("--backend", choices=EXPORT_BACKENDS, default="eager", help="'triton': the file loads only "
                        "where effformer.kernels.operators was imported; default: %(default)s")  # fmt: skip
    export.add_argument("--device", default="cpu", help="that the file is for: cpu, cuda, cuda:1, ...; default: "
                        "%(default)s")  # fmt: skip
    export.add_argument("--force", action="store_true", help="replace TARGET if it exists")
    export.set_defaults(command="export")


def _add_bench_run(bench: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = bench.add_parser(
        "run",
        help="whole networks: ours beside timm's, as it is and compiled",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Throughput, latency, memory, errors against float64 and top-1 agreement with float32, of timm's network\n"
            "(eager, BatchNorm folded, torch.compile up to max-autotune) and ours (eager, Triton, frozen), same\n"
            "weights and images, each in a process of its own. A cell is a model at a batch size, dtype and image\n"
            "size: all of these, or what there is of them when the time is over. A whole one is not measured again.\n"
            "Exit status: 0 when all is measured, 75 when the time was over first, 1 if a rung failed."
        ),
        epilog="example:\n  effformer bench --model efficientformer_l1 --dtype bfloat16 --batch-size 256 1",
    )
    run.add_argument("--model", nargs="+", choices=PRESETS, help="default: all; on a CPU l1")
    run.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="default: both of 16 bit; on a CPU float32 and bfloat16"
    )
    run.add_argument("--batch-size", nargs="+", type=_positive, metavar="N", help="default: 256 1 8 64 1024; on a CPU "
                     "1 8")  # fmt: skip
    run.add_argument("--size", nargs="+", type=_size, metavar="HxW", help="of the images, default: 224x224 384x384 "
                     "512x512; on a CPU 224x224")  # fmt: skip
    run.add_argument("--provider", nargs="+", metavar="NAME", help="of those that --list names, default: all; on a CPU "
                     "all without max-autotune")  # fmt: skip
    run.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    run.add_argument("--minutes", type=_minutes, default=9.0, metavar="M", help="up to 10, of all this command takes; "
                     "default: %(default)s")  # fmt: skip
    run.add_argument("--output", type=Path, default=Path("bench/results"), metavar="FOLDER", help="holds a folder of "
                     "results for each GPU; default: %(default)s")  # fmt: skip
    run.add_argument("--list", action="store_true", help="only say what there is to measure, and what is measured")
    run.set_defaults(command="bench")


def _add_bench_kernels(bench: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    kernels = bench.add_parser(
        "kernels",
        help="time the fused operations against eager PyTorch, torch.compile and others",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Time each fused operation, at the shapes that it has in a network, by our kernels and by what one could\n"
            "take instead: eager PyTorch, torch.compile, scaled_dot_product_attention, FlexAttention, cuBLAS with\n"
            "epilogues. Device time on a GPU, with cold caches; its share of what matrix products and copies reach in\n"
            "the same run; and the error against float64. Outcomes are kept as soon as they are there, in\n"
            "FOLDER/<gpu>/kernels.jsonl: the same command goes on where it stopped.\n"
            "Exit status: 0 when all is measured, 75 when the time was over first, 1 if one of our kernels failed."
        ),
        epilog="example:\n  effformer bench kernels --op meta4d --dtype bfloat16 --batch-size 256 1",
    )
    operations = [name for name in OPERATIONS if name != "network"]
    kernels.add_argument("--model", nargs="+", choices=PRESETS, help="default: all; on a CPU l1")
    kernels.add_argument("--op", nargs="+", choices=operations, default=operations, help="default: all")
    kernels.add_argument("--dtype", nargs="+", choices=DTYPES, help="in this order, default: bfloat16 float16 float32; "
                         "on a CPU float32")  # fmt: skip
    kernels.add_argument("--batch-size", nargs="+", type=_positive, metavar="N", help="default: 256 1 8 64; on a CPU "
                         "1")  # fmt: skip
    kernels.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    kernels.add_argument("--minutes", type=_minutes, default=9.0, metavar="M", help="up to 10, of all this command "
                         "takes; default: %(default)s")  # fmt: skip
    kernels.add_argument("--output", type=Path, default=Path("bench/results"), metavar="FOLDER", help="default: "
                         "%(default)s")  # fmt: skip
    kernels.set_defaults(command="bench_kernels")


def _add_bench_report(bench: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = bench.add_parser(
        "report",
        help="a page, pictures and README's table from what was measured",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Write index.html and its pictures for each GPU that `effformer bench` and `bench kernels` wrote results\n"
            "of: ours against the fastest other of the same run, errors beside speeds, what was not run and\n"
            "why. Nothing is measured. With --readme, also write the table between a README's markers\n"
            "<!-- benchmark --> and <!-- /benchmark -->; with --check write nothing, and exit with 1 if that differs."
        ),
        epilog="examples:\n  effformer bench report\n  effformer bench report --readme README.md --check",
    )
    report.add_argument("--results", type=Path, default=Path("bench/results"), metavar="FOLDER", help="holds a folder "
                        "for each GPU, default: %(default)s")  # fmt: skip
    report.add_argument("--gpu", metavar="NAME", help="its folder there, such as nvidia-h200; default: every one")
    report.add_argument("--output", type=Path, metavar="FOLDER", help="default: report/ in the folder of results")
    report.add_argument("--readme", type=Path, metavar="FILE", help="a README with the markers")
    report.add_argument("--check", action="store_true", help="only say whether FILE agrees with the results")
    report.set_defaults(command="bench_report")


def _add_input_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=_size, metavar="HxW", help="input size, default: the checkpoint's, or 224x224")
    parser.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")


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


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes <= 10:
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed are minutes, more than 0, up to 10")
    return minutes


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


if __name__ == "__main__":
    sys.exit(main())
