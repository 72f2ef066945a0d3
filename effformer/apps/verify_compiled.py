"""Verification of the kernels as compiled for a GPU that is not here: the work of `effformer verify --target`.

Triton compiles and launches them as on that GPU, over a driver that runs nothing. Their PTX is executed on the CPU,
with memory, races and waits watched. Machine code (ptxas) and time are not part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from ..accuracy import accuracy
from ..bench.offline.execution import Execution, executing
from ..bench.offline.ptx.machine import Options
from ..kernels.tiling.device import TARGETS, Device
from ..testing import Case, float32_as_such, unwritten_is_nan
from .verify import draw, summary
from .verify_report import Check, Outcome

# As far from float64 as the PTX ISA lets a GPU be: approximations off by their documented error, products fused with
# sums. Matrix units cut their sums off as well; that takes several times as long.
DEFAULT = Options(fuse=True, approximate=1.0)
TRUNCATING = Options(fuse=True, approximate=1.0, truncate=True)


def verify_compiled(
    checks: Iterable[Check], target: str, *, seed: int = 0, options: Options = DEFAULT
) -> Iterator[Outcome]:
    """Run checks one after another, all programs of each launch, in the CPU's memory.

    Args:
        checks: of `effformer.apps.verify.checks`, in any dtype of the kernels.
        target: "sm_90" or another of `TARGETS`.
        seed: of weights and inputs.
        options: of the machine that executes.

    An error that a check raises becomes its outcome, and the others go on. TF32 is off.

    Raises:
        ValueError: for another target.
        RuntimeError: where kernels cannot be executed: on a machine with a GPU that is not hidden, in a process that
            interprets, or without a C compiler.
    """
    device = device_of_target(target)
    with executing(device):  # raises where it cannot
        pass
    for check in checks:
        yield _outcome(check, device, seed, options)


def device_of_target(target: str) -> Device:
    """The GPU that "sm_90" stands for.

    Raises:
        ValueError: for a name of none that kernels are compiled for.
    """
    known = {f"sm_{capability}": device for capability, device in TARGETS.items()}
    if target not in known:
        raise ValueError(f"target: got {target!r}, allowed are {', '.join(known)}")
    return known[target]


def _outcome(check: Check, device: Device, seed: int, options: Options) -> Outcome:
    execution = Execution()
    found, raised = None, None
    try:
        subject = draw(check, torch.device("cpu"), seed)
        reached = () if isinstance(subject, Case) else subject.tensors
        with float32_as_such():
            with unwritten_is_nan(), executing(device, reached=reached, options=options) as execution:
                result = subject.run("triton")
            found = accuracy(result, subject.exact(), subject.run("eager"))
    except Exception as error:  # of any kind: it is this check's outcome, and the others go on
        raised = f"{type(error).__name__}: {error}"
    ran = summary([one.launch for one in execution.executed])
    faults = tuple(f"{kernel}: {fault}" for kernel, fault in execution.faults)
    return Outcome(check, found, ran=ran, faults=faults, raised=raised)
