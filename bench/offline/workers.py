"""Processes that compile kernels side by side."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, wait
from multiprocessing import active_children, get_context


def cores() -> int:
    """Processor cores that this process may use, 16 at most, since each compiler takes a gigabyte."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@contextlib.contextmanager
def compilers(workers: int) -> Iterator[Executor]:
    """Processes that do not interpret, even where this one does. Unfinished work is dropped at the end."""
    pool, others = ProcessPoolExecutor(workers, mp_context=get_context("spawn")), set(active_children())
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        # A task starts a process unless one is idle; processes inherit the environment.
        wait([pool.submit(os.getpid) for _ in range(workers)])
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret
    started = set(active_children()) - others
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in started:
            process.terminate()
