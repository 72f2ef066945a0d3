"""Check the kernels against float64.

Run the kernels on this machine and compare them with float64: each fused operation at the shapes that
it has in a network, and the network itself. Weights and inputs are random. An error may be twice that
of eager PyTorch in the same dtype (its mean 1.5 times) plus 2 ulp of the output's scale. NaN and
infinities must stand where float64 has them. Repeated runs must give the same bits. On a CPU the
kernels run in Triton's interpreter, which takes minutes and has no bfloat16.

Exit status: 0 if kernels ran and all passed; 1 if one failed, or none can run here.

For example:
  effformer verify
  effformer verify --op meta4d network --dtype fp16 --size 512x640 --json > report.json
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ..config import PRESETS
from ..workload import OPERATIONS
from . import common

if TYPE_CHECKING:
    from ..apps.verify_report import Outcome


def add(commands: common.Commands) -> None:
    parser = common.add_command(commands, "verify", main, __doc__)
    option = parser.add_argument
    option("--model", nargs="+", type=common.or_all(common.model), help="l1, l3, l7 or all; default: l1")
    option("--op", nargs="+", type=common.one_of("workload", "OPERATIONS", "network", "all"), help="of "
           f"{', '.join(OPERATIONS)}, network; default: all")  # fmt: skip
    option("--dtype", nargs="+", type=common.or_all(common.dtype), help="fp16, bf16, fp32 or all; default: all")
    common.add_size(parser)
    option("--batch-size", type=common.positive, metavar="N", help="default: 8 on a GPU, 2 on a CPU")
    common.add_device(parser)
    option("--seed", type=common.count, default=0, metavar="N", help="of weights and inputs; default: 0")
    option("--repeats", type=common.count, metavar="N", help="further runs that must give the same bits; default: 3 "
           "on a GPU, 0 on a CPU, where programs run one after another")  # fmt: skip
    common.add_json(parser)


def main(arguments: argparse.Namespace) -> int:
    device = common.torch_device(arguments.device)
    if device.type == "cpu" and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
    from ..apps.info import describe_backend, devices, versions
    from ..apps.verify import CHECKED, checks, verify, why_not_verified
    from ..apps.verify_report import VERDICTS, Columns, conclusion

    on_gpu = device.type == "cuda"
    batch_size = arguments.batch_size or (8 if on_gpu else 2)
    repeats = arguments.repeats if arguments.repeats is not None else 3 if on_gpu else 0
    todo = checks(
        _chosen(arguments.model, PRESETS, ["efficientformer_l1"]),
        _chosen(arguments.op, CHECKED, CHECKED),
        [common.torch_dtype(name) for name in _chosen(arguments.dtype, common.DTYPES, common.DTYPES)],
        size=arguments.size,
        batch_size=batch_size,
    )
    reason, table = why_not_verified(device), Columns(todo)
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
        print(f"device:   {device} ({facts['device_name']}){', interpreted' if facts['interpreted'] else ''}")
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
        common.print_json(facts | {"checks": [outcome.facts() for outcome in outcomes]})
    else:
        if reason is None:
            print()
        print("\n".join(conclusion(outcomes)))
    return 0 if passed else 1


def _chosen(named: list[str] | None, allowed: Iterable[str], default: Iterable[str]) -> list[str]:
    """The names that a list option stands for."""
    return [*default] if named is None else [*allowed] if "all" in named else named


def _followed(outcomes: Iterator[Outcome], total: int) -> tuple[Iterable[Outcome], Callable[[str], object]]:
    """`outcomes` behind a progress bar, and a function that prints beside it; no bar without tqdm or a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        if sys.stderr.isatty():
            print("effformer: no progress bar without tqdm, of the extra 'image'", file=sys.stderr)
        return outcomes, print
    return tqdm(outcomes, total=total, unit="check", disable=None, leave=False), tqdm.write
