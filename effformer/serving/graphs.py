"""CUDA graphs, captured where other threads may want to do the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Result = TypeVar("_Result")

# PyTorch captures one graph at a time in a process, and CUDA ends a capture when another thread waits for the device.
_LOCK = threading.RLock()


def capture_graph(forward: Callable[[], _Result], pool: Any) -> tuple[Any, torch.cuda.CUDAGraph, _Result]:
    """A graph's pool (a new one for None), a graph of `forward`, and the result that each replay writes again."""
    # Memory belongs to the stream that it was allocated on: graphs share it if they are captured on the same.
    handle, side = pool or (torch.cuda.graph_pool_handle(), torch.cuda.Stream())
    current, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    side.wait_stream(current)
    with torch.cuda.stream(side):  # a capture that fails may leave its stream behind as the current one
        for _ in range(2):  # what is compiled, loaded or chosen at first calls is not for a graph
            forward()
        # Other threads may use the GPU meanwhile.
        with _LOCK, torch.cuda.graph(graph, pool=handle, stream=side, capture_error_mode="thread_local"):
            results = forward()
    current.wait_stream(side)
    return (handle, side), graph, results


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given, when no graph is being captured."""
    with _LOCK:
        torch.cuda.synchronize(device)
