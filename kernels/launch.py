"""A kernel launch as data: the same object runs it, and lets it be compiled where there is no GPU."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .tiling.choose import Question
from .tiling.device import Device

# A process either interprets or compiles: triton.jit decides when it decorates.
INTERPRETED: bool = triton.knobs.runtime.interpret


# Sizes of images and batches. Kernels are not compiled anew where one is 1 or a multiple of 16: strides tell how
# addresses are aligned, so it would not make them faster. Attention's N is not here: masks of whole vectors save
# registers.
SIZES = ("rows", "H", "W", "OUT_H", "OUT_W", "tokens", "units_xb", "units_xh")

# Arguments that kernels write to: the result as a whole, the fold's in part.
OUTPUTS = ("out_ptr", "vectors_ptr", "matrices_ptr")


def is_output(argument: str) -> bool:
    """Whether kernels write to an argument of this name: those above, and further results, such as `out_sum_ptr`."""
    return argument in OUTPUTS or argument.startswith("out_")


def is_whole(argument: str) -> bool:
    """Whether a kernel writes every element of an argument of this name."""
    return argument.startswith("out_")


kernel = functools.partial(triton.jit, do_not_specialize=SIZES)

# Of the compiler, in all versions of Triton: fuse products with the sums that follow. Triton 3.10 changes the default.
_OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """`kernel` over `grid` programs.

    Attributes:
        arguments: name -> tensor (None for one that the constants switch off), int or float, read at run time.
        constants: name -> value that the kernel is compiled for.
        question: the look-up in the table that gave these tiles; None for a kernel without a choice.
    """

    kernel: Any
    grid: int
    arguments: dict[str, Tensor | int | float | None]
    constants: dict[str, Any]
    question: Question | None
    num_warps: int = 4
    num_stages: int = 2

    @property
    def configuration(self) -> dict[str, Any]:
        """The choices of the table: tiles, whether the residual is read again, warps, pipeline stages."""
        tiles = {name: value for name, value in self.constants.items() if name.startswith("BLOCK_")}
        chosen = {
            name: self.constants[name] for name in ("WIDTHS", "CHUNK", "RELOAD", "ONE_TILE") if name in self.constants
        }
        return tiles | chosen | {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def run(self) -> None:
        if (description := _description.get()) is not None:
            description.append(self)
            return
        for record in _records:
            record.append(self)
        if self.grid and _runs.get():
            self.kernel[(self.grid,)](**self._keywords)

    def compiled(self) -> Any:
        """Triton's compiled kernel for these arguments, on the current device; nothing is launched."""
        return self.kernel.run(grid=(self.grid,), warmup=True, **self._keywords)

    @property
    def options(self) -> dict[str, Any]:
        """How it is compiled."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **_OPTIONS}

    @property
    def _keywords(self) -> dict[str, Any]:
        return {**self.arguments, **self.constants, **self.options}


_records: list[list[Launch]] = []
_runs = contextvars.ContextVar("runs", default=True)
_description = contextvars.ContextVar[list[Launch] | None]("description", default=None)


@contextlib.contextmanager
def recorded(*, run: bool = True) -> Iterator[list[Launch]]:
    """Record every launch of this process, in order and from any thread; their tensors stay alive.

    Without `run` those of this context (and of no other thread) are not carried out.
    """
    record: list[Launch] = []
    _records.append(record)
    token = _runs.set(run and _runs.get())
    try:
        yield record
    finally:
        _runs.reset(token)
        _records[:] = [other for other in _records if other is not record]


def observed() -> bool:
    """Whether launches are recorded, or not carried out, so that each must pass through `Launch.run`."""
    return bool(_records) or not _runs.get()


@contextlib.contextmanager
def described() -> Iterator[list[Launch]]:
    """Collect the launches of this context instead of carrying them out; no record has them."""
    launches: list[Launch] = []
    token = _description.set(launches)
    try:
        yield launches
    finally:
        _description.reset(token)


def run(*launches: Launch) -> None:
    """Run launches that share a device, in order, on that device's current stream."""
    with _on_device_of(launches[0]):
        for launch in launches:
            launch.run()


def _on_device_of(launch: Launch) -> contextlib.AbstractContextManager[Any]:
    tensor = next(a for a in launch.arguments.values() if isinstance(a, Tensor))
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


@contextlib.contextmanager
def compile_within() -> Iterator[None]:
    """Compile the launches that are made within it, side by side, at its end; none is carried out."""
    with recorded(run=False) as launches:
        yield
    if launches and not INTERPRETED:
        with _on_device_of(launches[0]):
            compiled([launch for launch in launches if launch.grid])


def compiled(launches: Sequence[Launch]) -> list[Any]:
    """Triton's compiled kernels for launches on the current device; those that are new are compiled side by side."""
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool, triton.AsyncCompileMode(pool):
        for launch in launches:
            launch.compiled()
    return [launch.compiled() for launch in launches]


def dot_precision(dtype: torch.dtype, *, convolution: bool, exact: str = "ieee") -> str:
    """`input_precision` of products in `dtype`: for float32, "tf32" where PyTorch's own flag allows it, else `exact`.

    PyTorch has a flag for convolutions, which allows TF32 by default, and one for matrix products, which does not.
    """
    if dtype != torch.float32:
        return "ieee"
    convolutions, products = tf32_allowed()
    return "tf32" if (convolutions if convolution else products) else exact


def tf32_allowed() -> tuple[bool, bool]:
    """Whether PyTorch's flags let float32 convolutions, and matrix products, round to TF32."""
    flags = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return flags[0].fp32_precision == "tf32", flags[1].fp32_precision == "tf32"


def float32_products(device: Device) -> str:
    """The fastest `input_precision` with float32's own accuracy.

    Three TF32 products are faster than fused multiply-adds and more accurate than cuBLAS (bench/NOTES.md, 3).
    """
    return "tf32x3" if device.chains_products else "ieee"
