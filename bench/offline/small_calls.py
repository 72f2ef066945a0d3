"""Small calls whose whole grids are executed: each kernel at a shape that takes a moment."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...accuracy import Accuracy, accuracy
from ...apps.verify import NetworkCase, draw
from ...apps.verify_compiled import DEFAULT
from ...apps.verify_report import NETWORK, Check
from ...kernels.tiling.device import TARGETS
from ...testing import Case, float32_as_such, unwritten_is_nan
from .access_log import AccessLog
from .execution import Executed, Execution, executing
from .ptx.machine import Options

_NETWORK = {"name": "efficientformer_l1", "depths": (1, 1, 1, 2), "widths": (8, 8, 8, 16), "num_heads": 2, "key_dim": 8}


@dataclass(frozen=True)
class SmallCall:
    """A small call, and the kernels of those that it launches that faults are planted in.

    `programs`: of each launch the first few; 0 for all.
    """

    operation: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    kernels: tuple[str, ...] = ()
    programs: int = 0


CALLS = (
    SmallCall("pool_mixer", (1, 48, 9, 14), {}, ("pool_mixer",)),
    SmallCall("meta4d", (1, 48, 14, 14), {"hidden": 192}, ("mlp",)),
    SmallCall("conv_mlp", (2, 96, 9, 14), {"hidden": 384}, ("split_mlp", "split_sum")),
    SmallCall("conv_norm", (1, 48, 28, 28), {"outputs": 96}, ("conv_norm",)),
    SmallCall("attention_mixer", (1, 49, 224), {"num_heads": 4, "key_dim": 32, "value_dim": 64},
         ("layer_norm", "linear", "bias_attention")),
    SmallCall("head", (2, 49, 448), {"classes": 100}, ("head",)),
    SmallCall("head", (40, 9, 72), {"classes": None}, ("token_mean",)),
    SmallCall(NETWORK, (1, 3, 33, 64), _NETWORK, ("fold",)),
)  # fmt: skip
FAMILIES = tuple(name for small in CALLS for name in small.kernels)


@dataclass
class CompiledCall:
    """A call on a target."""

    small: SmallCall
    capability: int
    dtype: torch.dtype

    def subject(self, seed: int = 0) -> Case | NetworkCase:
        check = Check(self.small.operation, self.small.shape, self.dtype, self.small.options, ())
        return draw(check, torch.device("cpu"), seed)

    def run(
        self,
        base: str = "",
        edited: str = "",
        options: Options = DEFAULT,
        log: AccessLog | None = None,
        seed: int = 0,
    ) -> tuple[Execution, Tensor, Case | NetworkCase]:
        """Execute it, with `edited` wherever the compiled code is `base`."""
        subject = self.subject(seed)
        reached = [] if isinstance(subject, Case) else subject.tensors
        recording = contextlib.nullcontext() if log is None else log.recording()
        device, edit = TARGETS[self.capability], lambda name, text: edited if base and text == base else text
        choose = (lambda launch: range(self.small.programs)) if self.small.programs else None
        with (
            float32_as_such(),
            unwritten_is_nan(),
            executing(device, reached=reached, options=options, choose=choose, edit=edit) as execution,
            recording,
        ):
            return execution, subject.run("triton"), subject

    @functools.cached_property
    def compiled(self) -> tuple[list[Executed], set[tuple[str, str, int]], AccessLog]:
        """The launches as compiled, their known faults, and the log of their statements."""
        log = AccessLog(digests=False)
        execution, _, _ = self.run(log=log)
        return execution.executed, known_faults(execution), log

    def accuracy(self, execution: Execution, result: Tensor, subject: Case | NetworkCase) -> Accuracy:
        """The errors; of a part of the programs, those of the elements that it wrote."""
        chosen = execution.written(result) if self.small.programs else slice(None)
        with float32_as_such():
            return accuracy(result[chosen], subject.exact()[chosen], subject.run("eager")[chosen])


def family(one: Executed) -> str:
    return one.launch.kernel.__name__.removesuffix("_kernel")


def known_faults(execution: Execution) -> set[tuple[str, str, int]]:
    return {(kernel, fault.kind, fault.line) for kernel, fault in execution.faults}
