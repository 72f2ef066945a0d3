"""GPUs as the configurations see them."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """The properties of a GPU that a configuration depends on.

    Attributes:
        capability: compute capability, 90 for 9.0.
        shared_memory: the most bytes a block may have.
        name: "NVIDIA H200"; empty for a device that only stands in.
    """

    capability: int
    shared_memory: int
    name: str = ""

    @property
    def chains_products(self) -> bool:
        """Whether products may follow each other into one accumulator within a step of a pipelined loop.

        Not in the tensor memory of sm_100: Triton 3.6 and 3.7 read it before the second product ends, and `make audit`
        sees it (triton-lang/triton#10821).
        """
        return not 100 <= self.capability < 120


AMPERE = Device(80, 166_912)  # A100
CONSUMER = Device(86, 101_376)  # RTX 30; 89 (RTX 40, L4) and 120 (RTX 50) have as much
HOPPER = Device(90, 232_448)  # H100, H200; the interpreter takes its tiles
BLACKWELL = Device(100, 232_448)  # B200
CLASSES = {f"sm_{device.capability}": device for device in (AMPERE, CONSUMER, HOPPER, BLACKWELL)}

# The GPUs that the kernels are compiled for and checked on, by compute capability.
TARGETS = {
    80: AMPERE,
    86: CONSUMER,
    89: Device(89, CONSUMER.shared_memory),
    90: HOPPER,
    100: BLACKWELL,
    120: Device(120, CONSUMER.shared_memory),
}


@functools.cache
def device_class(device: Device) -> str:
    """The class whose entries a device takes: the nearest that is not newer and fits its shared memory.

    Raises:
        ValueError: if there is none.
    """
    fitting = {
        name: (known.shared_memory, known.capability)
        for name, known in CLASSES.items()
        if known.shared_memory <= device.shared_memory and known.capability <= device.capability
    }
    if not fitting:
        least = min(known.shared_memory for known in CLASSES.values())
        raise ValueError(f"device: got {device}, allowed are GPUs with {least} bytes of shared memory a block")
    return max(fitting, key=lambda name: fitting[name])


@functools.cache
def _cuda_device(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    return Device(10 * found.major + found.minor, found.shared_memory_per_block_optin, found.name)  # type: ignore[attr-defined]


_stand_in = contextvars.ContextVar("stand_in", default=HOPPER)


@contextlib.contextmanager
def stand_in(device: Device) -> Iterator[None]:
    """Within it, tensors that are on no GPU (interpreted, or meta for compilation) count as being on `device`."""
    token = _stand_in.set(device)
    try:
        yield
    finally:
        _stand_in.reset(token)


def device_of(device: torch.device) -> Device:
    """The configuration's view of a torch device."""
    return _cuda_device(device.index or 0) if device.type == "cuda" else _stand_in.get()
