"""Capture CUDA graphs in a process where other threads may do the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Result = TypeVar("_Result")

# PyTorch captures one graph at a time in a process. CUDA ends a capture when another thread waits for the device.
_LOCK = threading.RLock()


def capture_graph(forward: Callable[[], _Result], pool: Any) -> tuple[Any, torch.cuda.CUDAGraph, _Result]:
    """Returns (the memory pool, a new one for None; a graph of `forward`; its result, overwritten by each replay)."""
    # Memory belongs to the stream that it was allocated on: graphs share it if they are captured on the same.
    handle, side = pool or (torch.cuda.graph_pool_handle(), torch.cuda.Stream())
    current, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    side.wait_stream(current)
    with torch.cuda.stream(side):  # a capture that fails may leave its stream behind as the current one
        for _ in range(2):  # warm up: compilation and loading must not be captured
            forward()
        # Other threads may use the GPU meanwhile.
        with _LOCK, torch.cuda.graph(graph, pool=handle, stream=side, capture_error_mode="thread_local"):
            results = forward()
    current.wait_stream(side)
    return (handle, side), graph, results


def wait_for(device: torch.device) -> None:
    """Wait for all work of a GPU, at a time when no graph is being captured."""
    with _LOCK:
        torch.cuda.synchronize(device)
