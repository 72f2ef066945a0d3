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
from typing import Any

from . import common


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
    from ..serving.export import SUFFIXES, check_suffix, export

    target: Path = arguments.target
    by_suffix = next((name for name, suffix in SUFFIXES.items() if suffix == target.suffix.lower()), None)
    format: Any = arguments.format or by_suffix
    if format is None:
        raise ValueError(f"TARGET: got {target}, allowed are *.pt2 and *.onnx")
    check_suffix("TARGET", target, format)
    if target.exists() and not arguments.force:
        raise FileExistsError(f"{target} exists: --force replaces it")
    device = common.torch_device(arguments.device)
    say = common.printer(arguments.json)
    network, name, _, weights = common.load_network(
        arguments.model, arguments.checkpoint, "eager", say, arguments.which
    )
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
        checks = [{"shape": shape, **asdict(found)} for shape, found in written.checks.items()]
        facts = {"model": name, "weights": weights, "bytes": target.stat().st_size}
        common.print_json(facts | asdict(written) | {"checks": checks})
    else:
        print(written)
    return 0
