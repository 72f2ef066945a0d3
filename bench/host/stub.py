"""Triton's launch path without a GPU: its driver for CUDA over a library that runs nothing (libcuda.c).

Kernels are compiled for the GPU that is asked for, an H100 by default, and launched with tensors in the CPU's memory.
The host does the same as on a GPU, but for the driver's own work and for PyTorch's allocator, which is the CPU's.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ... import backend
from ...kernels.register import accepting_cpu
from ...kernels.tiling.choose import user_file
from ...kernels.tiling.device import HOPPER, TARGETS

SOURCE = Path(__file__).with_name("libcuda.c")


class Stub:
    """The library, as processes have it once.

    Attributes:
        device: the compute capability of the device in use, such as 90.
        folder: that the library is in.
    """

    def __init__(self) -> None:
        library = _build()
        self.folder = str(library.parent)  # stays: Triton links launchers with it later on
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self._library.stub_launches.restype = ctypes.c_uint64
        self._listener: Any = None
        self.use(HOPPER.capability)

    def use(self, capability: int) -> None:
        """Stand for a GPU of this compute capability, one of `TARGETS`."""
        self.device = capability
        self._library.stub_device(capability, TARGETS[capability].shared_memory)

    @property
    def launches(self) -> int:
        """Launches so far."""
        return int(self._library.stub_launches())

    @property
    def listening(self) -> bool:
        """Whether launches are reported."""
        return bool(self._listener)

    def listen(self, listener: Callable[[LaunchCall], None] | None) -> None:
        """Have each launch reported; None ends it. The listener must not raise."""

        def told(function: int, x: int, y: int, z: int, threads: int, shared_memory: int, parameters: Any) -> None:
            assert listener is not None
            listener(LaunchCall(function, (x, y, z), threads, shared_memory, parameters))

        self._listener = _LISTENER(told) if listener else _LISTENER()
        self._library.stub_listen(self._listener)


@dataclass(frozen=True)
class LaunchCall:
    """A launch as it reaches the driver.

    Attributes:
        function: its handle.
        grid: programs in each direction.
        threads: of a program.
        shared_memory: bytes of a program.
        parameters: an array of the addresses of all parameters.
    """

    function: int
    grid: tuple[int, int, int]
    threads: int
    shared_memory: int
    parameters: Any

    def parameter(self, place: int, size: int) -> int:
        """The bits of a parameter of `size` bytes."""
        return int.from_bytes(ctypes.string_at(self.parameters[place], size), "little")


_LISTENER = ctypes.CFUNCTYPE(
    None, ctypes.c_uint64, *[ctypes.c_uint] * 5, ctypes.POINTER(ctypes.c_void_p)
)  # as in libcuda.c
_stub: Stub | None = None


@contextlib.contextmanager
def stub_driver(device: int = HOPPER.capability) -> Iterator[Stub]:
    """Within it Triton launches over the stub, for a GPU of this compute capability, and kernels accept CPU tensors.

    Triton keeps the library for as long as the process lives; there may be no other driver in it.

    Raises:
        RuntimeError: on a machine with a GPU, in a process that interprets, or without a C compiler.
    """
    global _stub
    if torch.cuda.is_available():
        raise RuntimeError("the stub driver is for machines without a GPU: hide it (CUDA_VISIBLE_DEVICES=)")
    stub = _stub or Stub()
    before = stub.device
    stub.use(device)
    try:
        with mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=stub.folder):
            if _stub is None:
                _activate(stub)
                _stub = stub
            with mock.patch.object(backend, "_why_not_device", return_value=None), accepting_cpu():
                yield stub
    finally:
        stub.use(before)


def _build() -> Path:
    """The compiled library, in the user's cache; in the end processes find it by its soname, loaded already."""
    compiler = os.environ.get("CC") or (sysconfig.get_config_var("CC") or "cc").split()[0]
    options = ["-shared", "-fPIC", "-O2", "-w", "-Wl,-soname,libcuda.so.1"]
    digest = hashlib.sha256(repr((compiler, options, SOURCE.read_bytes())).encode()).hexdigest()[:16]
    target = user_file().parent / f"stub-{digest}" / "libcuda.so.1"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        command = [compiler, *options, "-o", str(partial), str(SOURCE)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"{' '.join(command)}: {getattr(error, 'stderr', error)}") from error
        partial.replace(target)
    return target


def _activate(stub: Stub) -> None:
    import triton
    from triton.backends.nvidia import driver

    from ...kernels.launch import INTERPRETED

    if INTERPRETED:
        raise RuntimeError("the stub driver needs a process without TRITON_INTERPRET")

    class Driver(driver.CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:  # the base class asks torch for a GPU
            self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher
            self.get_device_capability = lambda *_: divmod(stub.device, 10)
            self.get_current_device = lambda: stub.device  # Triton keeps compiled kernels by device
            self.get_current_stream = lambda *_: 0
            self.set_current_device = lambda *_: None

    triton.runtime.driver.set_active(Driver())
