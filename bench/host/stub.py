"""Triton's launch path without a GPU: its driver for CUDA over a library that runs nothing (libcuda.c).

Kernels are compiled as for an H100 and launched with tensors in the CPU's memory. What the host does is as on a GPU,
but for the driver's own work and for PyTorch's allocator, which is the CPU's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

from ... import backend

SOURCE = Path(__file__).with_name("libcuda.c")


@contextlib.contextmanager
def stub_driver() -> Iterator[Callable[[], int]]:
    """Within it Triton launches over the stub, and the kernels accept CPU tensors; gives the number of launches so far.

    Once in a process: Triton keeps the library for as long as it lives.

    Raises:
        RuntimeError: on a machine with a GPU, in a process that interprets, or without a C compiler.
    """
    if torch.cuda.is_available():
        raise RuntimeError("the stub driver is for machines without a GPU: hide it (CUDA_VISIBLE_DEVICES=)")
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.CDLL(str(_build(Path(folder))), mode=ctypes.RTLD_GLOBAL)
        library.stub_launches.restype = ctypes.c_uint64
        with mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=folder):
            _activate()
            with mock.patch.object(backend, "_why_not_device", return_value=None):
                yield lambda: int(library.stub_launches())


def _build(folder: Path) -> Path:
    """Compile the library; in the end processes find it by its soname, loaded already."""
    compiler = os.environ.get("CC") or (sysconfig.get_config_var("CC") or "cc").split()[0]
    target = folder / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-O2", "-w", "-Wl,-soname,libcuda.so.1", "-o", str(target), str(SOURCE)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"{' '.join(command)}: {getattr(error, 'stderr', error)}") from error
    return target


def _activate() -> None:
    import triton
    from triton.backends.nvidia import driver

    from ...kernels.launch import INTERPRETED

    if INTERPRETED:
        raise RuntimeError("the stub driver needs a process without TRITON_INTERPRET")

    class Driver(driver.CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:  # the base class asks torch for a GPU
            self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher
            self.get_device_capability = lambda *_: (9, 0)
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda *_: 0
            self.set_current_device = lambda *_: None

    triton.runtime.driver.set_active(Driver())
