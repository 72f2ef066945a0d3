"""Loads, stores and atomics, of global and shared memory; matrices of 8x8 between shared memory and registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .machine import merged
from .numbers import F32, TYPES, U16, U32, U64, UNSIGNED, Array, width
from .registry import Step, UnknownInstructionError, instruction

if TYPE_CHECKING:
    from .machine import Machine
    from .program import Instruction

_KIND = r"(?P<kind>[subf](?:8|16|32|64))"
_CACHE = r"(?:\.(?:L1|L2)::[\w:]+|\.nc|\.c[agsv]|\.lu|\.w[bt]|\.relaxed|\.volatile|\.weak|\.gpu|\.cta)*"


def access_size(i: Instruction) -> int:
    """Bytes that a load, store or atomic moves for each lane."""
    parts = i.name.split(".")
    return next((int(part[1:]) for part in parts if part in ("v2", "v4", "v8")), 1) * width(parts[-1])


@instruction(rf"ld{_CACHE}\.(?P<space>global|shared(?:::cta)?){_CACHE}(?:\.v(?P<count>[248]))?\.{_KIND}")
def load(m: Machine, i: Instruction, space: str, count: str | None, kind: str) -> Step:
    registers, names, size = m.registers, m.listed(i.operands[0]), width(kind)
    targets = [m.target(name) for name in names]
    storages = [m.storage(name, UNSIGNED[max(size, 2)]) for name in names]
    if len(names) != int(count or 1):
        raise UnknownInstructionError(i, f"{len(names)} registers")
    address = m.address(i.operands[1], "b64" if space == "global" else "b32")

    def run() -> None:
        active = m.active(i)
        if space == "global":
            values = m.memory.load(m, i, address(), active, size, len(names))
        else:
            values = m.shared.load(i, address(), active, size, len(names))
        for target, value, storage in zip(targets, values, storages, strict=True):
            found = value if value.dtype == storage else _extended(value, kind, storage)
            registers[target] = merged(active, found, registers[target]) if i.predicate else found

    return _keeping(run), targets


def _extended(value: Array, kind: str, storage: Any) -> Array:
    if kind[0] == "s":
        return value.view(TYPES[kind]).astype(TYPES[f"s{8 * np.dtype(storage).itemsize}"]).view(storage)
    return value.astype(storage)


@instruction(r"createpolicy\.fractional\.L2::evict_\w+(?:\.L2::evict_\w+)?\.b64")
def create_policy(m: Machine, i: Instruction) -> Step:
    """A hint for caches, which are not here."""
    registers, target = m.registers, m.target(i.operands[0])

    def run() -> None:
        registers[target] = np.zeros(m.lanes, U64)

    return run, [target]


def _keeping(run: Callable[[], None]) -> Callable[[], None]:
    """Mark a function that looks at the instruction's predicate itself."""
    run.predicated = True  # type: ignore[attr-defined]
    return run


@instruction(rf"st{_CACHE}\.(?P<space>global|shared(?:::cta)?){_CACHE}(?:\.v(?P<count>[248]))?\.{_KIND}")
def store(m: Machine, i: Instruction, space: str, count: str | None, kind: str) -> Step:
    registers, size = m.registers, width(kind)
    sources = [m.source(name, f"b{8 * max(size, 2)}") for name in m.listed(i.operands[1])]
    if len(sources) != int(count or 1):
        raise UnknownInstructionError(i, f"{len(sources)} registers")
    address = m.address(i.operands[0], "b64" if space == "global" else "b32")

    def run() -> None:
        values = [registers[source].astype(UNSIGNED[size], copy=False) for source in sources]
        if space == "global":
            m.memory.store(m, i, address(), m.active(i), size, values)
        else:
            m.shared.store(i, address(), m.active(i), size, values)

    return run, []


@instruction(rf"(?P<head>atom|red){_CACHE}\.global{_CACHE}\.add(?:\.v(?P<count>[24]))?\.f32")
def add_atomically(m: Machine, i: Instruction, head: str, count: str | None) -> Step:
    """Lanes add in their order; float32 sums depend on it."""
    registers = m.registers
    names = m.listed(i.operands[0]) if head == "atom" else []
    targets, (where, what) = [m.target(name) for name in names], i.operands[-2:]
    sources, address = [m.source(name, "b32") for name in m.listed(what)], m.address(where, "b64")
    if len(sources) != int(count or 1):
        raise UnknownInstructionError(i, f"{len(sources)} registers")

    def run() -> None:
        active = m.active(i)
        values = [registers[source].view(F32) for source in sources]
        before = m.memory.add_to(m, i, address(), active, F32, values)
        for target, value in zip(targets, before, strict=False):
            found = value.view(U32)
            registers[target] = merged(active, found, registers[target]) if i.predicate else found

    return _keeping(run), targets


# --- matrices ---------------------------------------------------------------------------------------------------------


def _matrix_rows(
    m: Machine, i: Instruction, operand: str, registers: int, count: int
) -> Callable[[], tuple[Array, Array]]:
    """The lanes that give addresses of rows of 16 bytes, the first 8 * count of a warp, and the rows' offsets."""
    address, supplies = m.address(operand, "b32"), m.in_warp < 8 * count
    if registers != count:
        raise UnknownInstructionError(i, f"{registers} registers")

    def rows() -> tuple[Array, Array]:
        m.check_whole(i)
        on = m.active(i)
        return m.shared.places(i, address(), supplies if on is None else supplies & on, 16)

    return rows


@instruction(r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<trans>\.trans)?\.shared(?:::cta)?\.b16")
def load_matrices(m: Machine, i: Instruction, count: str, trans: str | None) -> Step:
    registers, targets = m.registers, [m.target(name) for name in m.listed(i.operands[0])]
    number, rows = len(targets), _matrix_rows(m, i, i.operands[1], len(targets), int(count))

    def run() -> None:
        lanes, at = rows()
        m.shared.mark_read(i, lanes, at, 16)
        tiles = np.zeros((m.lanes, 8), U16)
        tiles[lanes] = m.shared.chunks[at // 16]
        matrices = tiles.reshape(m.warps, 32, 8)[:, : 8 * number].reshape(m.warps, number, 8, 8)
        if trans:
            matrices = matrices.swapaxes(2, 3)
        values = np.ascontiguousarray(matrices).view(U32).reshape(m.warps, number, 32)
        for place, target in enumerate(targets):
            registers[target] = np.ascontiguousarray(values[:, place]).reshape(-1)

    return run, targets


@instruction(r"stmatrix\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<trans>\.trans)?\.shared(?:::cta)?\.b16")
def store_matrices(m: Machine, i: Instruction, count: str, trans: str | None) -> Step:
    registers, sources = m.registers, [m.source(name, "b32") for name in m.listed(i.operands[1])]
    number, places = len(sources), _matrix_rows(m, i, i.operands[0], len(sources), int(count))

    def run() -> None:
        lanes, at = places()
        m.shared.mark_write(i, lanes, at, 16)
        values = np.stack([registers[source].reshape(m.warps, 8, 4) for source in sources], 1)
        tiles = np.ascontiguousarray(values).view(U16).reshape(m.warps, number, 8, 8)
        if trans:
            tiles = tiles.swapaxes(2, 3)
        rows = np.zeros((m.warps, 32, 8), U16)
        rows[:, : 8 * number] = tiles.reshape(m.warps, -1, 8)
        m.shared.chunks[at // 16] = rows.reshape(-1, 8)[lanes]

    return run, []
