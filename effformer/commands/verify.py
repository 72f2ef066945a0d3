"""Check the kernels against float64.

Run the kernels on this machine and compare them with float64: each fused operation at the shapes that
it has in a network, and the network itself. Weights and inputs are random. An error may be twice that
of eager PyTorch in the same dtype (its mean 1.5 times) plus 2 ulp of the output's scale. NaN and
infinities must stand where float64 has them. Repeated runs must give the same bits. On a CPU the
kernels run in Triton's interpreter, which takes minutes and has no bfloat16.

With --target they are compiled for a GPU that is not here, and the compiled code (PTX) is executed on
the CPU. Memory, races, fences and waits are watched; each fault names the line of the kernel.

With --backward the gradients of each operation's arguments are compared instead, where kernels compute
them (pool_mixer, conv_mlp, meta4d). Errors of a parameter's gradient may be three times eager's.

Exit status: 0 if kernels ran and all passed; 1 if one failed, or none can run here.

For example:
  effformer verify
  effformer verify --op meta4d network --dtype fp16 --size 512x640 --json > report.json
  effformer verify --target sm_90 --op conv_norm --dtype bf16
  effformer verify --backward
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..config import PRESETS
from ..workload import DIFFERENTIABLE, OPERATIONS
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
    parser.set_defaults(model=["efficientformer_l1"], op=["all"], dtype=["all"])
    common.add_size(parser)
    option("--batch-size", type=common.positive, metavar="N", help="default: 8 on a GPU, 2 on a CPU, 1 with --target")
    common.add_device(parser)
    option("--target", type=common.target, metavar="SM", help="sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120: execute "
           "the kernels as compiled for such a GPU, on the CPU")  # fmt: skip
    option("--backward", action="store_true", help="compare gradients")
    option("--truncate", action="store_true", help="with --target: cut the sums of matrix products off as measured on "
           "GPUs; takes several times as long")  # fmt: skip
    option("--seed", type=common.count, default=0, metavar="N", help="of weights and inputs; default: 0")
    option("--repeats", type=common.count, metavar="N", help="further runs that must give the same bits; default: 3 "
           "on a GPU, 0 on a CPU, where programs run one after another")  # fmt: skip
    common.add_json(parser)


def main(arguments: argparse.Namespace) -> int:
    if arguments.truncate and not arguments.target:
        raise ValueError("--truncate: got it without --target, allowed is both together")
    if arguments.backward:
        _check_backward(arguments)
    if arguments.target:
        _check_target(arguments)
        common.execute_on_cpu()
    device = common.torch_device("cpu" if arguments.target else arguments.device)
    if device.type == "cpu" and not arguments.target and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
    from ..apps.info import describe_backend, devices, versions
    from ..apps.verify import CHECKED, checks, verify, why_not_verified
    from ..apps.verify_report import VERDICTS, Columns, conclusion

    on_gpu, target, backward = device.type == "cuda", arguments.target, arguments.backward
    batch_size = arguments.batch_size or (8 if on_gpu else 1 if target else 2)
    repeats = 0 if target else arguments.repeats if arguments.repeats is not None else 3 if on_gpu else 0
    todo = checks(
        _chosen(arguments.model, PRESETS),
        _chosen(arguments.op, CHECKED),
        [common.torch_dtype(name) for name in _chosen(arguments.dtype, common.DTYPES)],
        size=arguments.size,
        batch_size=batch_size,
    )
    if backward:
        from ..apps import verify_gradients

        todo = verify_gradients.gradient_checks(todo)
    reason, table = None if target else why_not_verified(device), Columns(todo)
    facts: dict[str, Any] = {
        "versions": versions(),
        "device": device,
        "device_name": devices()[str(device)],
        "interpreted": reason is None and not on_gpu and not target,
        "target": target,
        "backward": backward,
        "backend": "triton" if target else describe_backend("auto", device),
        "size": arguments.size,
        "batch_size": batch_size,
        "seed": arguments.seed,
        "repeats": repeats,
    }
    say, (height, width) = common.printer(arguments.json), arguments.size
    say("  ".join(f"{name} {version}" for name, version in versions().items()))
    how = f", compiled for {target} and executed here" if target else ", interpreted" if facts["interpreted"] else ""
    say(f"device:   {device} ({facts['device_name']}){how}")
    say(f"backend:  {facts['backend']}; verified here: {'none' if reason else 'triton'}")
    say(f"input:    {batch_size}x3x{height}x{width}, seed {arguments.seed}, {repeats} further runs\n")

    def found() -> Iterable[Outcome]:
        if not target:
            check = verify_gradients.verify_gradients if backward else verify
            return check(todo, device, seed=arguments.seed, repeats=repeats)
        from ..apps.verify_compiled import DEFAULT, TRUNCATING, verify_compiled

        options = TRUNCATING if arguments.truncate else DEFAULT
        execute = verify_gradients.verify_gradients_compiled if backward else verify_compiled
        return execute(todo, target, seed=arguments.seed, options=options)

    if reason is None:
        say(table.head())
    outcomes = []
    for outcome in found():
        outcomes.append(outcome)
        if not outcome.skipped:
            say(table.line(outcome))
    say("\n".join(["", *conclusion(outcomes)] if reason is None else conclusion(outcomes)))
    counts = {verdict: sum(outcome.verdict == verdict for outcome in outcomes) for verdict in VERDICTS}
    passed = counts["pass"] > 0 and counts["fail"] == 0
    if arguments.json:
        facts |= {"passed": passed, "counts": counts, "why_no_kernel": reason}
        common.print_json(facts | {"checks": [outcome.facts() for outcome in outcomes]})
    return 0 if passed else 1


def _check_target(arguments: argparse.Namespace) -> None:
    """Refuse options that have no meaning beside --target."""
    if arguments.device not in ("auto", "cpu"):
        raise ValueError(f"--device: got {arguments.device!r} with --target, allowed is cpu")
    if arguments.repeats:
        raise ValueError(f"--repeats: got {arguments.repeats} with --target, allowed is 0: a machine repeats itself")


def _check_backward(arguments: argparse.Namespace) -> None:
    """Refuse operations whose gradients no kernel computes."""
    if wrong := [name for name in arguments.op if name not in ("all", *DIFFERENTIABLE)]:
        allowed = ", ".join((*DIFFERENTIABLE, "all"))
        raise ValueError(f"--op: got {wrong[0]!r} with --backward, allowed are {allowed}")


def _chosen(named: list[str], allowed: Iterable[str]) -> list[str]:
    """The names that a list option stands for."""
    return [*allowed] if "all" in named else named
