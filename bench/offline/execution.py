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

from ...kernels.launch import Launch, is_output, is_whole, recorded
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
Output = tuple[str, Region, Units]  # the name of an argument, its memory, the units that belong to it
Choice = Callable[[Launch], Sequence[int] | None]  # the programs of a launch to run; None for all


@dataclass(frozen=True)
class Executed:
    """A launch that was carried out, whole or in part.

    Attributes:
        launch: as the kernels' launchers made it.
        ptx: the compiled code.
        program: the same, parsed.
        geometry: the launch as it reached the driver, with addresses of the memory that it was carried out on.
        outputs: tensors that it has to write as a whole.
        outcome: with faults and counts.
    """

    launch: Launch
    ptx: str
    program: Program
    geometry: Geometry
    outputs: list[Output]
    outcome: Outcome


@dataclass
class Execution:
    """Launches in order, and the memory that they share.

    Attributes:
        executed: the launches.
        memory: a region for each storage, far from each other.
        regions: those of the launches' arguments, by the address of the storage.
    """

    executed: list[Executed] = field(default_factory=list)
    memory: GlobalMemory = field(default_factory=GlobalMemory)
    regions: dict[int, Region] = field(default_factory=dict)

    @property
    def faults(self) -> list[tuple[str, Fault]]:
        """Each with the name of its kernel."""
        return [(one.launch.kernel.__name__, fault) for one in self.executed for fault in one.outcome.faults]

    def allow(self, launch: Launch) -> None:
        """Let programs reach the memory of a launch's arguments, and no other launch's."""
        for region in self.regions.values():
            region.writable = region.readable = False
        for name, tensor in launch.arguments.items():
            place = tensor.untyped_storage().data_ptr() if isinstance(tensor, Tensor) else None
            if place in self.regions:
                self.regions[place].readable = True
                self.regions[place].writable |= is_output(name)

    def written(self, tensor: Tensor) -> Tensor:
        """bool like `tensor`: the elements that launches wrote."""
        region = self.regions[tensor.untyped_storage().data_ptr()]
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
        RuntimeError: within another `executing`, on a machine with a GPU, in a process that interprets, or without a C
            compiler; at the end, for launches that were not carried out. The first error of a launch passes through.
    """
    runner = _Runner(options or Options(), choose or (lambda launch: None), edit)
    for tensor in reached:
        runner.reach(tensor)
    with contextlib.ExitStack() as stack:
        stub = stack.enter_context(stub_driver(device.capability))
        stack.enter_context(stand_in(device))
        stack.enter_context(without_ptxas())
        stack.enter_context(_noting_functions())
        runner.launches = stack.enter_context(recorded())
        if stub.listening:
            raise RuntimeError("kernels are executed within another `executing` already")
        stack.callback(stub.listen, None)
        stub.listen(runner.listen)
        try:
            yield runner.execution
        finally:
            if runner.error is not None:
                raise runner.error
    if len(runner.execution.executed) != sum(launch.grid > 0 for launch in runner.launches):
        raise RuntimeError("a launch did not reach the driver, and was not carried out")


@contextlib.contextmanager
def without_ptxas() -> Iterator[None]:
    """Let Triton compile to PTX alone, with a cache of its own, whose files no GPU can load."""
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


@functools.lru_cache(64)
def _code(function: int) -> tuple[str, Program]:
    if function not in _ptx:
        raise RuntimeError("a kernel was loaded before, to be launched and not executed: start a process of its own")
    text = _ptx[function].read_text(encoding="utf-8")
    return text, parse(text)


class _Runner:
    """Carries out launches as they reach the driver."""

    def __init__(self, options: Options, choose: Choice, edit: Edit | None) -> None:
        self.options, self.choose, self.edit = options, choose, edit
        self.execution = Execution(memory=GlobalMemory())
        self.launches: list[Launch] = []
        self.error: BaseException | None = None

    def listen(self, call: LaunchCall) -> None:
        if self.error is None:
            try:
                self._execute(call, self.launches[-1])
            except BaseException as error:  # it may not pass through the driver's C code
                self.error = error

    def _execute(self, call: LaunchCall, launch: Launch) -> None:
        text, program = _code(call.function)
        if self.edit is not None and (edited := self.edit(program.name, text)) != text:
            text, program = edited, parse(edited)
        if call.threads != program.threads or call.grid != (launch.grid, 1, 1):
            raise RuntimeError(f"{program.name} was launched with {call.threads} threads over {call.grid}, and is "
                               f"compiled for {program.threads}, described over {launch.grid}")  # fmt: skip
        sizes = [width(kind) for _, kind in program.parameters]
        outputs = self._map(launch)
        parameters = [self._moved(call.parameter(place, size), size) for place, size in enumerate(sizes)]
        programs = self.choose(launch)
        geometry = Geometry(call.grid, call.shared_memory, parameters)
        outcome = execute(program, geometry, self.execution.memory, programs=programs, options=self.options)
        if programs is None:
            outcome.faults.extend(wrong_writes(launch, outputs, lambda region: region.writes))
        self.execution.executed.append(Executed(launch, text, program, geometry, outputs, outcome))

    def _map(self, launch: Launch) -> list[Output]:
        """Map the tensors of a launch and nothing else; returns the outputs."""
        outputs, atomic = [], bool(launch.constants.get("ATOMIC"))
        for name, tensor in launch.arguments.items():
            if not isinstance(tensor, Tensor) or not tensor.untyped_storage().nbytes():
                continue
            region, inside = self._map_tensor(name, tensor)
            if is_output(name):
                known = region.output
                region.become_output()
                region.cleared = atomic
                if known:
                    region.writes[inside] = 0
            if is_whole(name):
                outputs.append((name, region, inside))
        self.execution.allow(launch)
        return outputs

    def reach(self, tensor: Tensor) -> None:
        """Map a tensor at its own address, to be read alone."""
        start = tensor.untyped_storage().data_ptr()
        if start and all(region.start != start for region in self.execution.memory.regions):
            data = _bytes(tensor)
            self.execution.memory.add(Region("a tensor of the network", start, data, min(tensor.element_size(), 2)))

    def _map_tensor(self, name: str, tensor: Tensor) -> tuple[Region, Units]:
        """The region of a tensor's storage, far from others, and its units that belong to the tensor."""
        execution, start = self.execution, tensor.untyped_storage().data_ptr()
        region = execution.regions.get(start)
        if region is None:
            place = (len(execution.regions) + 1) * _APART
            region = Region(name, place, _bytes(tensor), min(tensor.element_size(), 2))
            execution.regions[start] = execution.memory.add(region)
            if not _fills(tensor):
                region.outside = np.ones(region.units, bool)
        if _fills(tensor):  # without an array of its size: untouched memory is free
            region.outside = None
            return region, slice(None)
        inside = _units(tensor, region)
        if region.outside is not None:
            region.outside[inside] = False
            region.outside = region.outside if region.outside.any() else None
        return region, inside

    def _moved(self, parameter: int, size: int) -> int:
        """The address within a region for one within a storage; another parameter as it is."""
        for start, region in self.execution.regions.items() if size == 8 else ():
            if start <= parameter <= start + len(region.data):
                return parameter - start + region.start
        return parameter


_APART = 1 << 38  # bytes between regions: an access beyond one never lands in another


def _bytes(tensor: Tensor) -> Array:
    """The storage of a tensor, in place."""
    storage = tensor.untyped_storage()
    found: Array = np.ctypeslib.as_array((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()))
    return found


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


def wrong_writes(launch: Launch, outputs: Sequence[Output], count: Callable[[Region], Array]) -> list[Fault]:
    """Faults where a launch does not write each unit of its outputs as often as it should, given how often it does.

    That is once; twice for a kernel that keeps the residual in its output. Programs that add to it do so equally often.
    """
    found = []
    for name, region, inside in outputs:
        writes = count(region)[inside]
        if not writes.size:
            continue
        times = 2 if launch.constants.get("POOL") and launch.constants.get("RELOAD") else 1
        if launch.constants.get("ATOMIC"):
            times = max(1, int(writes.max()))
        missing, wrong = int((writes == 0).sum()), int((writes != times).sum())
        if wrong:
            detail = f"{missing} never, {wrong - missing} another number of times, in units of {region.unit} bytes"
            found.append(Fault(f"elements of the output are not written {times} times", 0, "", name, detail, wrong))
    return found
