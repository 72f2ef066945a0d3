"""Read image files as batches of a network's input, in several processes (extra `image`)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader

from .images import Preprocessing

WORKERS = min(8, os.cpu_count() or 1)  # processes that decode
KILLED = "decoding was killed (out of memory?)"


def _crops(preprocessing: Preprocessing, paths: Iterable[Path]) -> list[bytes | str]:
    """The pixels of each image's crop, RGB after RGB; for an image that cannot be read, the reason."""
    crops: list[bytes | str] = []
    for path in paths:
        try:
            crops.append(preprocessing.read(path).tobytes())
        except OSError as error:
            crops.append(str(error))
    return crops


def _crop_alone(preprocessing: Preprocessing, path: Path) -> bytes | str:
    """As `_crops`, of one image in a process of its own, which may be killed."""
    with ProcessPoolExecutor(1) as pool:
        try:
            return pool.submit(_crops, preprocessing, [path]).result()[0]
        except BrokenProcessPool:
            return KILLED


def _decoding(
    preprocessing: Preprocessing, paths: Sequence[Path], batch_size: int, workers: int
) -> Iterator[list[bytes | str]]:
    """The `_crops` of each batch."""
    # Bytes go through a pipe. Tensors would need shared memory, of which containers have little.
    batches: Iterable[list[bytes | str]] = DataLoader(
        paths,  # type: ignore[arg-type]  # a sequence will do
        batch_size,
        num_workers=workers,
        prefetch_factor=1 if workers else None,
        collate_fn=partial(_crops, preprocessing),
    )
    # In the main thread PyTorch would install a signal handler, which raises a worker's death anywhere in the program.
    with ThreadPoolExecutor(1) as other:
        return other.submit(iter, batches).result()


def read_batches(
    paths: Sequence[Path], preprocessing: Preprocessing, batch_size: int, workers: int = WORKERS
) -> Iterator[tuple[list[int], Tensor | None, dict[int, str]]]:
    """Images as a network's input, decoded by `workers` processes, each one batch ahead of the caller.

    Where one of these is killed, the batch is read again, each image in a process of its own.

    Yields:
        for each `batch_size` paths, in their order: (indices of the images that could be read, batch [B, 3, H, W] or
        None if none could, index -> reason of those that could not).
    """
    starts = range(0, len(paths), batch_size)
    workers = min(workers, len(starts)) if len(starts) > 1 else 0  # one batch takes no longer than starting a process
    batches = None
    for start in starts:
        items = None
        try:
            batches = batches or _decoding(preprocessing, paths[start:], batch_size, workers)
            items = next(batches)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            batches = None  # ends the other workers, too
        if items is None:
            items = [_crop_alone(preprocessing, path) for path in paths[start : start + batch_size]]
        crops = {start + offset: item for offset, item in enumerate(items) if isinstance(item, bytes)}
        failures = {start + offset: item for offset, item in enumerate(items) if isinstance(item, str)}
        yield list(crops), preprocessing._batch(*crops.values()) if crops else None, failures
