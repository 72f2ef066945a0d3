"""Write a file for torch.export, AOTInductor or ONNX.

Write the network, folded, to a file that runs without its Python code, for batches of any size:
  pt2    a graph for torch.export.load
  aoti   compiled code for torch._inductor.aoti_load_package and C++. Compiling takes half a minute or
         more, and minutes with --dynamic-size.
  onnx   for onnxruntime and others
The file is loaded again and compared with float64. It is kept only if it is as accurate as eager PyTorch.

For example:
  effformer export l1.onnx --checkpoint pretrained
  effformer export l1.pt2 --format aoti --checkpoint weights.pth --size 512x640 --output features
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import common

if TYPE_CHECKING:
    from ..serving.export import Exported


def add(commands: common.Commands) -> None:
    parser = common.add_command(commands, "export", main, __doc__, "TARGET is as it was")
    option = parser.add_argument
    option("target", type=Path, metavar="TARGET", help="*.pt2, or *.onnx")
    option("--format", type=common.one_of("serving.export", "FORMATS"), help="pt2, aoti or onnx; default: by TARGET's "
           "suffix pt2 or onnx")  # fmt: skip
    common.add_network(parser, "file, folder, hub id owner/name, 'pretrained', or 'none' (random weights, seed 0)")
    option("--output", type=common.one_of("serving.packing", "OUTPUTS"), default="logits", help="logits, pooled or "
           "features; default: %(default)s")  # fmt: skip
    common.add_size(parser)
    option("--dynamic-size", action="store_true", help="leave both sides free, from 33 pixels on")
    option("--dtype", type=common.dtype, default="float32", help="fp32, bf16 or fp16; default: fp32")
    option("--backend", type=common.one_of("serving.export", "BACKENDS"), default="eager", help="eager, or triton: the "
           "file then loads only after `import effformer.kernels.operators`; default: %(default)s")  # fmt: skip
    option("--device", default="cpu", help="the device that the file is for: cpu, cuda, ...; default: %(default)s")
    option("--force", action="store_true", help="replace TARGET if it exists")
    common.add_json(parser)


def main(arguments: argparse.Namespace) -> int:
    from ..serving.export import export

    target: Path = arguments.target
    format = _format(target, arguments.format)
    if target.exists() and not arguments.force:
        raise FileExistsError(f"{target} exists: --force replaces it")
    device = common.torch_device(arguments.device)
    say = common.printer(arguments.json)
    network, name, _, weights = common.load_network(arguments.model, arguments.checkpoint, "eager", say)
    say(f"model:    {name}, weights: {'random (seed 0)' if weights == 'none' else weights}")
    written = export(
        network.to(device).eval(),
        target,
        format,
        output=arguments.output,
        size=arguments.size,
        dynamic_size=arguments.dynamic_size,
        dtype=common.torch_dtype(arguments.dtype),
        backend=arguments.backend,
    )
    if arguments.json:
        common.print_json({"model": name, "weights": weights} | _facts(written))
    else:
        print(written)
    return 0


def _format(target: Path, asked: str | None) -> Any:
    """The format that was asked for, or that TARGET's suffix stands for."""
    from ..serving.export import SUFFIXES

    fitting = [format for format, suffix in SUFFIXES.items() if suffix == target.suffix]
    if not fitting:
        raise ValueError(
            f"TARGET: got {target}, allowed are {', '.join(f'*{s}' for s in dict.fromkeys(SUFFIXES.values()))}"
        )
    if asked not in (None, *fitting):
        raise ValueError(f"--format: got {asked}, allowed with *{target.suffix} are {', '.join(fitting)}")
    return asked or fitting[0]


def _facts(written: Exported) -> dict[str, Any]:
    return {
        "path": str(written.path),
        "bytes": written.path.stat().st_size,
        "format": written.format,
        "images": list(written.images),
        "dtype": str(written.dtype).removeprefix("torch."),
        "outputs": list(written.outputs),
        "needs": written.needs,
        "checks": [{"shape": list(shape), **asdict(found)} for shape, found in written.checks.items()],
    }
