"""Helpers for tests of live networks: their launches, their plans, and the results of their modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from effformer.kernels import launch
from machine import SLACK
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from effformer import EfficientFormer, set_backend
from effformer.model import live

SHAPE = (2, 3, 33, 64)
Narrow = Callable[..., EfficientFormer]


class Operations(TorchDispatchMode):
    """Names of the operators below the dispatcher, without views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("empty", "empty_strided", "detach", "_unsafe_view"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def launches_of(call: Callable[[], object]) -> tuple[list[launch.Launch], list[str]]:
    """Triton's launches, which are not carried out, and PyTorch's own operators."""
    with torch.no_grad(), launch.recorded(run=False) as launches, Operations() as operations:
        call()
    return launches, operations.names


def planned(network: EfficientFormer) -> list[bool]:
    """Whether the last forward of the stem, of each stage and of the end was by a plan."""
    states = [live._states.get(part) for part in (network.stem, *network.stages, network)]
    return [state is not None and any(not isinstance(one, str) for one in state.plans.values()) for state in states]


def eager(network: EfficientFormer, x: Tensor) -> Tensor:
    """The result of a copy whose modules compute it."""
    other = copy.deepcopy(network)
    set_backend(other, "eager")
    with torch.no_grad():
        return other(x)


def check(network: EfficientFormer, x: Tensor) -> None:
    """The network's result is that of its modules."""
    with torch.no_grad():
        assert torch.allclose(network(x), eager(network, x), rtol=0, atol=SLACK)
