"""Choose the tiles of a kernel. Launchers ask here, and with them the audit, the tuner and the tests.

The answers come from a table, `configurations.json`. On a GPU the results of `effformer bench tune` on that very card
come first (`user_file`). Of the entries for an operation the first whose conditions hold counts; tiles shrink to shapes
that are smaller.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..limits import beyond_attention, beyond_norm
from .device import Device
from .table import (
    AttentionBackwardConfig,
    AttentionConfig,
    Entry,
    GramConfig,
    HeadConfig,
    LinearConfig,
    MlpConfig,
    NormConfig,
    PoolConfig,
    SplitConfig,
    Table,
    read_json,
    read_table,
)
from .table import entries as parse

SHIPPED = Path(__file__).with_name("configurations.json")


class Question(NamedTuple):
    """A launcher's question to the table; `sizes` in the order of `DIMENSIONS[operation]`."""

    operation: str
    dtype: torch.dtype
    sizes: tuple[int, ...]


def mlp_config(question: Question, device: Device) -> MlpConfig | SplitConfig | None:
    """Tiles of the fused MLP or of the split one, or None for two products with the hidden in memory.

    The operation is "meta4d", "conv_mlp" or "linear_mlp" (never fused). The accumulator holds all channels of a row: in
    16 bit and with many rows a tile it spills, or leaves shared memory, beyond 224.
    """
    return answer(question, device)


def linear_config(question: Question, device: Device) -> LinearConfig:
    """Tiles of a [rows, inputs] x [inputs, outputs] product, no larger than it needs."""
    found: LinearConfig = answer(question, device)
    outputs, inputs, _ = question.sizes
    return replace(found, widths=_fitting(found.widths, outputs), block_k=_power(inputs, found.block_k))


def conv_config(question: Question, device: Device) -> LinearConfig | None:
    """Tiles of a 3x3 convolution as a matrix product, whose depth is channels of a tap; None for the vendor's."""
    found: LinearConfig | None = answer(question, device)
    return None if found is None else replace(found, widths=_fitting(found.widths, question.sizes[0]))


def _fitting(widths: tuple[int, ...], outputs: int) -> tuple[int, ...]:
    """A tile's widths, or one that is no wider than the product."""
    whole = sum(widths)
    return widths if outputs >= whole else (_power(outputs, 1 << (whole - 1).bit_length()),)


def attention_config(question: Question, device: Device) -> AttentionConfig:
    """Tiles of queries and keys; the width is that of keys, or of the values that one program computes.

    Raises:
        ValueError: for queries and keys that do not fit on chip.
    """
    tokens, width = question.sizes
    if reason := beyond_attention(width, question.dtype, device):
        raise ValueError(reason)
    found: AttentionConfig = answer(question, device)
    return replace(found, block_m=_power(tokens, found.block_m), block_n=_power(tokens, found.block_n))


def attention_backward_config(question: Question, device: Device) -> AttentionBackwardConfig:
    """Tokens of a tile, and parts of the bias' gradient; the width is that of keys or of values."""
    found: AttentionBackwardConfig = answer(question, device)
    return replace(found, block_m=_power(question.sizes[0], found.block_m))


def gram_config(question: Question, device: Device) -> GramConfig:
    """Tiles of the covariance of channels, no wider than these."""
    found: GramConfig = answer(question, device)
    return replace(found, block_c=_power(question.sizes[0], found.block_c))


def pool_config(question: Question, device: Device) -> tuple[int, int, int]:
    """(rows, channels) of a tile of `pool_mixer` or `split_sum`, and the warps.

    No more channels than the largest power of two in their number: none are padded.
    """
    found: PoolConfig = answer(question, device)
    channels = question.sizes[0]
    block_c = min(max(channels & -channels, 16), found.block_c)
    return max(1, found.elements // block_c), block_c, found.num_warps


def norm_config(question: Question, device: Device) -> tuple[int, int, int]:
    """(rows, channels) of a tile and the warps: whole rows, several where they are short.

    The operation is "layer_norm", or "token_mean", for which rows are images and a tile has rows of one.

    Raises:
        ValueError: for rows too long to be kept on chip.
    """
    channels = question.sizes[0]
    if reason := beyond_norm(channels):
        raise ValueError(reason)
    found: NormConfig = answer(question, device)
    block_c = _power(channels, 1 << 15)
    return max(1, found.elements // block_c), block_c, found.num_warps


class HeadTiles(NamedTuple):
    """Tokens, channels, classes and, of these, those that are multiplied at once."""

    block_t: int
    block_c: int
    block_n: int
    block_w: int
    num_warps: int


def head_config(question: Question, device: Device) -> HeadTiles | None:
    """Tiles of the network's end, or None where it is two launches.

    A first few of the class tile's weights wait in registers while the tokens are pooled: a quarter of a tile of these.
    """
    found: HeadConfig | None = answer(question, device)
    if found is None:
        return None
    channels, classes, _ = question.sizes
    block_c = _power(channels, 1 << 15)
    block_n = 1 << max(0, min(classes, found.block_n) - 1).bit_length()
    block_w = min(block_n, max(1, found.elements // 4 // block_c))
    return HeadTiles(max(1, found.elements // block_c), block_c, block_n, block_w, found.num_warps)


def _power(size: int, most: int) -> int:
    """The smallest power of two of 16 or more that holds `size`, or `most`."""
    power = 16
    while power < size and power < most:
        power *= 2
    return power


def user_file() -> Path:
    """The configurations tuned on this machine, under $XDG_CACHE_HOME or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "effformer" / "configurations.json"


KERNELS = Path(__file__).parents[1]


def fingerprint(kernels: Path = KERNELS) -> dict[str, str]:
    """The state that a tuned configuration is valid for: the kernels' source and Triton's version."""
    import triton

    return {"kernels": digest_of(kernels, "*.py"), "triton": triton.__version__}


def digest_of(folder: Path, *patterns: str) -> str:
    """A digest of the names and contents of all files in `folder`, at any depth, that match one of `patterns`."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.rglob(pattern)}):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def read_user_entries(path: Path) -> list[Entry]:
    """The entries of a user's file; none, with a warning, if other kernels or another Triton were tuned.

    Raises:
        ValueError: for a file of another kind.
    """
    if not path.exists():
        return []
    found = read_json(path)
    if not isinstance(found, dict) or set(found) != {"fingerprint", "entries"}:
        raise ValueError(f"{path}: allowed are the fields fingerprint and entries: delete it, or tune again")
    if found["fingerprint"] != fingerprint():
        warnings.warn(
            f"{path} was tuned for {found['fingerprint']}, and this is {fingerprint()}: it is not used; "
            "`effformer bench tune` tunes again",
            stacklevel=2,
        )
        return []
    return parse(found["entries"], path)


@functools.cache
def shipped_table() -> Table:
    return Table(read_table(SHIPPED))


@functools.cache
def _tuned_table() -> Table:
    try:
        tuned = read_user_entries(user_file())
    except (OSError, RuntimeError, ValueError) as error:  # a missing home folder raises a RuntimeError
        warnings.warn(f"the configurations tuned on this machine are not used: {error}", stacklevel=2)
        tuned = []
    return Table([*tuned, *shipped_table().entries])


_override = contextvars.ContextVar[Table | None]("override", default=None)


@contextlib.contextmanager
def using(table: Table) -> Iterator[None]:
    """Within it `table` alone answers."""
    token = _override.set(table)
    try:
        yield
    finally:
        _override.reset(token)


def overriding() -> Table | None:
    """The table that alone answers now (`using`), None where that is the device's own."""
    return _override.get()


def preferring(*entries: Entry) -> contextlib.AbstractContextManager[None]:
    """Within it these entries come before the shipped ones, and a user's are left out: to try them."""
    return using(Table([*entries, *shipped_table().entries]))


_asked = contextvars.ContextVar[list[Question] | None]("asked", default=None)


@contextlib.contextmanager
def asked() -> Iterator[list[Question]]:
    """Collect the questions that launchers ask within it."""
    questions: list[Question] = []
    token = _asked.set(questions)
    try:
        yield questions
    finally:
        _asked.reset(token)


def answer(question: Question, device: Device) -> Any:
    """The configuration that the table has for this question on this device.

    Raises:
        LookupError: if the table has none.
    """
    if (questions := _asked.get()) is not None:
        questions.append(question)
    table = _override.get() or (_tuned_table() if device.name else shipped_table())
    return table.find(question.operation, question.dtype, device, *question.sizes).use
