"""Carries out launches on a CPU, of kernels as compiled for a GPU that is not here.

Triton compiles and launches as on a GPU, over the stub driver: the order of arguments, their specialisation and the
grid are those that a GPU would get. ptxas, which makes machine code of PTX, is left out.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor

from ...kernels.launch import OUTPUTS, Launch, recorded
from ...kernels.tiling.choose import user_file
from ...kernels.tiling.device import Device, stand_in
from ..host.stub import LaunchCall, stub_driver
from .ptx.execute import Outcome, execute
from .ptx.faults import Fault
from .ptx.global_memory import GlobalMemory, Region
from .ptx.machine import Launch as Geometry
from .ptx.machine import Options
from .ptx.numbers import Array, width
from .ptx.program import Program, parse

Edit = Callable[[str, str], str]  # from the name of a kernel and its PTX to other PTX
Units = Array | slice  # of a region
Choice = Callable[[Launch], Sequence[int] | None]  # the programs of a launch to run; None for all


@dataclass(frozen=True)
class Executed:
    """A launch that was carried out, whole or in part.

    Attributes:
        launch: as the kernels' launchers made it.
        ptx: the compiled code.
        program: the same, parsed.
        geometry: the launch as it reached the driver.
        outcome: with faults and counts.
        bytes_read, bytes_written: of distinct sectors of 32 bytes; 0 where traffic is not counted.
    """

    launch: Launch
    ptx: str
    program: Program
    geometry: Geometry
    outcome: Outcome
    bytes_read: int
    bytes_written: int


@dataclass
class Execution:
    """Launches in order, and the memory that they share.

    Attributes:
        executed: the launches.
        memory: a region for each storage.
    """

    executed: list[Executed] = field(default_factory=list)
    memory: GlobalMemory = field(default_factory=GlobalMemory)

    @property
    def faults(self) -> list[tuple[str, Fault]]:
        """Each with the name of its kernel."""
        return [(one.launch.kernel.__name__, fault) for one in self.executed for fault in one.outcome.faults]

    def written(self, tensor: Tensor) -> Tensor:
        """bool like `tensor`: the elements that launches wrote."""
        region = next(one for one in self.memory.regions if one.start == tensor.untyped_storage().data_ptr())
        writes = torch.from_numpy(region.writes[:: tensor.element_size() // region.unit] > 0)
        return writes.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@contextlib.contextmanager
def executing(
    device: Device,
    *,
    reached: Iterable[Tensor] = (),
    options: Options | None = None,
    choose: Choice | None = None,
    edit: Edit | None = None,
) -> Iterator[Execution]:
    """Within it, launches on CPU tensors are compiled for `device` and carried out here.

    Args:
        device: whose compute capability and shared memory count.
        reached: tensors that kernels reach through tables of addresses, and not by arguments.
        options: of the machine.
        choose: the programs of each launch to run; by default all.
        edit: changes PTX before it is executed, to plant a fault.

    Raises:
        RuntimeError: on a machine with a GPU, in a process that interprets, or without a C compiler; at the end, the
            first error of a launch.
    """
    runner = _Runner(options or Options(), choose or (lambda launch: None), edit)
    for tensor in reached:
        runner.map_tensor("a tensor of the network", tensor)
    with contextlib.ExitStack() as stack:
        stub = stack.enter_context(stub_driver(device.capability))
        stack.enter_context(stand_in(device))
        stack.enter_context(without_ptxas())
        stack.enter_context(_noting_functions())
        runner.launches = stack.enter_context(recorded())
        stack.callback(stub.listen, None)
        stub.listen(runner.listen)
        yield runner.execution
    if runner.error is not None:
        raise runner.error


@contextlib.contextmanager
def without_ptxas() -> Iterator[None]:
    """Let Triton compile to PTX alone, with a cache of its own: what it holds is not for a GPU."""
    from triton.backends.nvidia import compiler

    folder = str(user_file().parent / "ptx")
    with (
        mock.patch.object(compiler.CUDABackend, "make_cubin", return_value=b""),
        mock.patch.object(triton.knobs.cache, "dir", folder),
    ):
        yield


_ptx: dict[int, Path] = {}  # handles of functions -> their PTX; Triton loads each once in a process


@contextlib.contextmanager
def _noting_functions() -> Iterator[None]:
    def loaded(module: Any, function: int, name: str, files: dict[str, str], hash: str) -> None:
        _ptx[function] = Path(next(path for file, path in files.items() if file.endswith(".ptx")))

    hook = triton.knobs.runtime.kernel_load_end_hook
    hook.add(loaded)
    try:
        yield
    finally:
        hook.remove(loaded)


@functools.cache
def _code(function: int) -> tuple[str, Program]:
    text = _ptx[function].read_text(encoding="utf-8")
    return text, parse(text)


class _Runner:
    """Carries out launches as they reach the driver."""

    def __init__(self, options: Options, choose: Choice, edit: Edit | None) -> None:
        self.options, self.choose, self.edit = options, choose, edit
        self.execution = Execution(memory=GlobalMemory())
        self.launches: list[Launch] = []
        self._regions: dict[int, Region] = {}  # by the address of the storage
        self.error: Exception | None = None

    def listen(self, call: LaunchCall) -> None:
        if self.error is None:
            try:
                self._execute(call, self.launches[-1])
            except Exception as error:  # it may not pass through the driver's C code
                self.error = error

    def _execute(self, call: LaunchCall, launch: Launch) -> None:
        text, program = _code(call.function)
        if self.edit is not None and (edited := self.edit(program.name, text)) != text:
            text, program = edited, parse(edited)
        if call.threads != program.threads or call.grid != (launch.grid, 1, 1):
            raise RuntimeError(f"{program.name} was launched with {call.threads} threads over {call.grid}, and is "
                               f"compiled for {program.threads}, described over {launch.grid}")  # fmt: skip
        sizes = [width(kind) for _, kind in program.parameters]
        parameters = [call.parameter(place, size) for place, size in enumerate(sizes)]
        outputs = self._map(launch)
        programs = self.choose(launch)
        geometry = Geometry(call.grid, call.shared_memory, parameters)
        memory = self.execution.memory
        outcome = execute(program, geometry, memory, programs=programs, options=self.options)
        if programs is None and not launch.constants.get("ATOMIC"):
            # A kernel that keeps the residual in its output writes twice.
            times = 2 if launch.constants.get("POOL") and launch.constants.get("RELOAD") else 1
            wrong = [one for one in outputs if (one[1].writes[one[2]] != times).any()]
            outcome.faults.extend(_wrong_writes(*one, times) for one in wrong)
        read, written = (
            32 * sum(int(getattr(region, name).sum()) for region in memory.regions) if self.options.count else 0
            for name in ("read_sectors", "write_sectors")
        )
        self.execution.executed.append(Executed(launch, text, program, geometry, outcome, read, written))

    def _map(self, launch: Launch) -> list[tuple[str, Region, Units]]:
        """Map the tensors of a launch; returns the outputs with the units that belong to them."""
        memory, outputs = self.execution.memory, []
        for region in memory.regions:
            region.writable = False
        for name, tensor in launch.arguments.items():
            if not isinstance(tensor, Tensor) or not tensor.untyped_storage().nbytes():
                continue
            region, inside = self.map_tensor(name, tensor)
            if name in OUTPUTS:
                known = region.output
                region.become_output()
                region.writable = True
                if known or launch.constants.get("ATOMIC"):
                    region.writes[inside] = 1 if launch.constants.get("ATOMIC") else 0
            if name == OUTPUTS[0]:
                outputs.append((name, region, inside))
        return outputs

    def map_tensor(self, name: str, tensor: Tensor) -> tuple[Region, Units]:
        """The region of a tensor's storage, and its units that belong to the tensor."""
        start, bytes = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        region = self._regions.get(start)
        if region is None:
            data = np.ctypeslib.as_array((ctypes.c_uint8 * bytes).from_address(start))
            region = Region(name, start, data, min(tensor.element_size(), 2))
            self._regions[start] = self.execution.memory.add(region)
            if not _fills(tensor):
                region.outside = np.ones(region.units, bool)
        if _fills(tensor):  # without an array of its size: memory that nothing touches costs nothing
            region.outside = None
            return region, slice(None)
        inside = _units(tensor, region)
        if region.outside is not None:
            region.outside[inside] = False
            region.outside = region.outside if region.outside.any() else None
        return region, inside


def _fills(tensor: Tensor) -> bool:
    """Whether the tensor's elements are all of its storage."""
    if tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes():
        return False
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _units(tensor: Tensor, region: Region) -> Array:
    """bool [units of its storage]: those of the tensor's elements."""
    each = tensor.element_size() // region.unit
    marks = torch.zeros(region.units // each, dtype=torch.bool)
    marks.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    found: Array = marks.numpy()
    return np.pad(found.repeat(each) if each > 1 else found, (0, region.units - len(found) * each))


def _wrong_writes(name: str, region: Region, inside: Units, times: int) -> Fault:
    writes = region.writes[inside]
    missing, wrong = int((writes == 0).sum()), int((writes != times).sum())
    detail = f"{missing} never, {wrong - missing} another number of times, in units of {region.unit} bytes"
    return Fault(f"elements of the output are not written {times} times", 0, "", name, detail, wrong)
