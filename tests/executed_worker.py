"""A process without Triton's interpreter: carries launches out as compiled for a GPU, and saves their results.

The kernels are compiled as the interpreter computes them: without fusing products with sums, and without splitting
float32 into TF32. Its arguments are a file with the launches (`torch.save` of a list of `Call`) and one for the
results.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from effformer.bench.offline.execution import executing
from effformer.bench.offline.ptx.machine import Options
from effformer.kernels import launch as launches
from effformer.kernels.launch import OUTPUTS, Launch
from effformer.kernels.tiling.device import TARGETS
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """A launch as plain data, on a target; `arguments` hold the interpreter's result as well."""

    capability: int
    module: str
    kernel: str
    grid: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, launch: Launch, capability: int) -> Call:
        function = launch.kernel.fn
        return cls(capability, function.__module__, function.__name__, launch.grid, launch.arguments, launch.constants,
                   launch.num_warps, launch.num_stages)  # fmt: skip

    @property
    def result(self) -> Tensor:
        found: Tensor = self.arguments[OUTPUTS[0]]
        return found

    def carried_out(self) -> tuple[Tensor, list[str]]:
        """The result of the compiled kernel, and its faults."""
        out = torch.empty_strided(self.result.shape, self.result.stride(), dtype=self.result.dtype)
        kernel = getattr(importlib.import_module(self.module), self.kernel)
        exact = {"PRECISION": "ieee"} if "PRECISION" in self.constants else {}
        launch = Launch(kernel, self.grid, {**self.arguments, OUTPUTS[0]: out}, self.constants | exact, None,
                        self.num_warps, self.num_stages)  # fmt: skip
        with executing(TARGETS[self.capability], options=Options()) as execution:
            launch.run()
        return out, [str(fault) for _, fault in execution.faults]


def main(calls: str, results: str) -> None:
    torch.set_num_threads(1)
    with mock.patch.dict(launches._OPTIONS, enable_fp_fusion=False):
        found = [call.carried_out() for call in torch.load(calls, weights_only=False)]
    torch.save(found, results)


if __name__ == "__main__":
    sys.modules["executed_worker"] = sys.modules["__main__"]  # as the file names the class
    main(*sys.argv[1:])
