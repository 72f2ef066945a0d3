"""Small calls whose whole grids are executed: each kernel at a shape that takes a moment."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...accuracy import Accuracy, accuracy
from ...apps.verify import draw
from ...apps.verify_compiled import DEFAULT
from ...apps.verify_report import NETWORK, Check
from ...config import EfficientFormerConfig
from ...kernels.tiling.device import TARGETS
from ...model.network import EfficientFormer, set_backend
from ...testing import Case, draw_map, float32_as_such, randomise, unwritten_is_nan
from .execution import Executed, Execution, executing
from .ptx.machine import Options
from .touches import Touches

_CONFIG = EfficientFormerConfig(depths=(1, 1, 1, 2), widths=(8, 8, 8, 16), num_vit=1, num_heads=2, key_dim=8)


@dataclass(frozen=True)
class Work:
    """A small call, and the kernels of those that it launches that faults are planted in.

    `programs`: of each launch the first few; 0 for all.
    """

    operation: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    kernels: tuple[str, ...] = ()
    programs: int = 0


WORK = (
    Work("pool_mixer", (1, 48, 9, 14), {}, ("pool_mixer",)),
    Work("meta4d", (1, 48, 14, 14), {"hidden": 192}, ("mlp",)),
    Work("conv_mlp", (2, 96, 9, 14), {"hidden": 384}, ("split_mlp", "split_sum")),
    Work("conv_norm", (1, 48, 28, 28), {"outputs": 96}, ("conv_norm",)),
    Work("attention_mixer", (1, 49, 224), {"num_heads": 4, "key_dim": 32, "value_dim": 64},
         ("layer_norm", "linear", "bias_attention")),
    Work("head", (2, 49, 448), {"classes": 100}, ("head",)),
    Work("head", (40, 9, 72), {"classes": None}, ("token_mean",)),
    Work(NETWORK, (1, 3, 33, 64), {"name": "small"}, ("fold",)),
)  # fmt: skip
FAMILIES = tuple(name for work in WORK for name in work.kernels)


class _Small:
    """A small network, which folds its parameters, as `apps.verify.draw` gives larger ones."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, seed: int) -> None:
        self.network = randomise(EfficientFormer(_CONFIG, num_classes=5), seed).eval().to(dtype)
        self.images = draw_map(shape, dtype)
        self.tensors = [*self.network.parameters(), *self.network.buffers()]

    @torch.no_grad()
    def run(self, backend: str) -> Tensor:
        set_backend(self.network, backend)
        result: Tensor = self.network(self.images)
        return result

    @torch.no_grad()
    def exact(self) -> Tensor:
        exact = copy.deepcopy(self.network).double()
        set_backend(exact, "eager")
        result: Tensor = exact(self.images.double())
        return result


@dataclass
class Place:
    """A call on a target."""

    work: Work
    capability: int
    dtype: torch.dtype

    def subject(self, seed: int = 0) -> Case | _Small:
        if self.work.operation != NETWORK:
            found = draw(Check(self.work.operation, self.work.shape, self.dtype, self.work.options, ()),
                         torch.device("cpu"), seed)  # fmt: skip
            assert isinstance(found, Case)
            return found
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _Small(self.work.shape, self.dtype, seed)

    def run(
        self,
        base: str = "",
        edited: str = "",
        options: Options = DEFAULT,
        touches: Touches | None = None,
        seed: int = 0,
    ) -> tuple[Execution, Tensor, Case | _Small]:
        """Execute it, with `edited` wherever the compiled code is `base`."""
        subject = self.subject(seed)
        reached = [] if isinstance(subject, Case) else subject.tensors
        recording = contextlib.nullcontext() if touches is None else touches.recording()
        device, edit = TARGETS[self.capability], lambda name, text: edited if base and text == base else text
        choose = (lambda launch: range(self.work.programs)) if self.work.programs else None
        with (
            float32_as_such(),
            unwritten_is_nan(),
            executing(device, reached=reached, options=options, choose=choose, edit=edit) as execution,
            recording,
        ):
            return execution, subject.run("triton"), subject

    @functools.cached_property
    def compiled(self) -> tuple[list[Executed], set[tuple[str, str, int]], Touches]:
        """The launches as compiled, what the machine finds in them, and what they carry out."""
        touches = Touches(digests=False)
        execution, _, _ = self.run(touches=touches)
        return execution.executed, known_faults(execution), touches

    def accuracy(self, execution: Execution, result: Tensor, subject: Case | _Small) -> Accuracy:
        """The errors; of a part of the programs, those of what it wrote."""
        chosen = execution.written(result) if self.work.programs else slice(None)
        with float32_as_such():
            return accuracy(result[chosen], subject.exact()[chosen], subject.run("eager")[chosen])


def family(one: Executed) -> str:
    return one.launch.kernel.__name__.removesuffix("_kernel")


def known_faults(execution: Execution) -> set[tuple[str, str, int]]:
    return {(kernel, fault.kind, fault.line) for kernel, fault in execution.faults}
