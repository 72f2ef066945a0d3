"""Compare each fused operation with its alternatives.

Time each fused operation at the shapes that it has in a network: our kernels, eager PyTorch,
torch.compile, scaled_dot_product_attention, FlexAttention, and cuBLAS with epilogues. On a GPU this is
device time with cold caches, also as a share of the speed that matrix products and copies reach in the
same run. The error against float64 stands beside it. Results are written at once to
FOLDER/<gpu>/kernels.jsonl; the same command goes on where it stopped.

Exit status: 0 when all is measured, 75 when the time was over first, 1 if one of our kernels failed.

For example:
  effformer bench kernels --op meta4d --dtype bf16 --batch-size 256 1
"""

from __future__ import annotations

import argparse

from ..config import PRESETS
from ..workload import OPERATIONS
from . import common
from .bench import add_measuring, open_results, show

# Models, dtypes and batch sizes that are measured where none are named.
ON_GPU = (list(PRESETS), ["bfloat16", "float16", "float32"], [256, 1, 8, 64])
ON_CPU = (["efficientformer_l1"], ["float32"], [1])


def add(commands: common.Commands) -> None:
    parser = common.add_command(commands, "kernels", main, __doc__, common.RESUMES)
    option = parser.add_argument
    option("--model", nargs="+", type=common.model, help="default: all; on a CPU l1")
    option("--op", nargs="+", type=common.one_of("workload", "OPERATIONS"), help="of "
           f"{', '.join(OPERATIONS)}; default: all")  # fmt: skip
    option("--dtype", nargs="+", type=common.dtype, help="in this order; default: bf16 fp16 fp32; on a CPU fp32")
    option("--batch-size", nargs="+", type=common.positive, metavar="N", help="default: 256 1 8 64; on a CPU 1")
    add_measuring(parser)


def main(arguments: argparse.Namespace) -> int:
    from ..bench.measure import operations

    file = open_results(arguments, operations.FILE)
    models, dtypes, batch_sizes = ON_GPU if file.machine.is_gpu else ON_CPU
    todo = operations.in_order(
        arguments.model or models,
        arguments.op or OPERATIONS,
        [common.torch_dtype(name) for name in arguments.dtype or dtypes],
        arguments.batch_size or batch_sizes,
    )
    return show(
        arguments,
        file,
        todo,
        key=operations.key_of,
        is_complete=lambda check: operations.is_complete(check, file),
        measure=operations.measure_operations,
    )
