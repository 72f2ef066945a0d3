"""Whether accesses are ordered: by barriers of a program, barriers of a warp, and the ends of copies and products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .ptx.numbers import Array

SHARED, GLOBAL, TENSOR = range(3)  # spaces
_ASYNC = 1 << 30  # in place of a warp: a copy or product under way


@dataclass
class Run:
    """The accesses of programs that run side by side.

    Attributes:
        barriers, warp_barriers: how many each lane, and each warp, has passed.
        since: the time of each lane's last barrier.
        rows: units touched: space, place, warp, lane, barriers and barriers of the warp passed, whether written, time.
        flights: units of copies and products: space, place, begin, end, whether written, and the time since which the
            accesses of other warps have to be ordered as well.
        issuers: warps that issue products in tensor memory.
        begun: copies and products under way.
        time: accesses so far.
    """

    barriers: Array
    warp_barriers: Array
    since: Array
    rows: list[Array] = field(default_factory=list)
    flights: list[Array] = field(default_factory=list)
    issuers: set[int] = field(default_factory=set)
    begun: dict[Any, list[tuple[int, int, int]]] = field(default_factory=dict)
    time: int = 0

    def add(self, space: int, places: Array, lanes: Array, write: bool, warps: Array | None = None) -> None:
        """Places [n, units] that lanes [n] touch."""
        warp = lanes // 32 if warps is None else warps
        columns = (warp, lanes, self.barriers[lanes], self.warp_barriers[lanes // 32])
        self.rows.append(_columns(space, places, *columns, write, self.time))

    def begin(self, keys: list[Any], lanes: Array) -> None:
        """A copy or product begins for each lane, known by its key."""
        times = zip([self.time] * len(keys), self.barriers[lanes].tolist(), self.since[lanes].tolist(), strict=True)
        for key, one in zip(keys, times, strict=True):
            self.begun.setdefault(key, []).append(one)

    def end_waited(self, keys: list[Any], lanes: Array, places: Array, write: bool) -> None:
        """It ends as a wait of these lanes tells: to others their next barrier does."""
        begin, barriers, _ = np.array([self.begun[key].pop(0) for key in keys]).T
        now = self.barriers[lanes]
        for passed in range(1, int((now - barriers).max())):
            on = np.flatnonzero(barriers + passed < now)
            self.add(SHARED, places[on], lanes[on], write, np.full(len(on), _ASYNC))
            self.rows[-1][:, 4] = np.repeat(barriers[on] + passed, places.shape[1])
        self.add(SHARED, places, lanes, write)
        self.flights.append(_columns(SHARED, places, begin, self.time, write, begin + 1))

    def end_product(self, key: Any, lane: int, parts: list[tuple[int, Array, bool]]) -> None:
        """It ends as a barrier in memory tells, for which all warps wait; parts: space, places [1, units], written."""
        begin, _, since = self.begun.pop(key)[0]
        self.issuers.add(lane // 32)
        for space, places, write in parts:
            self.flights.append(_columns(space, places, begin, self.time, write, since))


def _columns(space: int, places: Array, *values: Any) -> Array:
    """A row for each of places [n, units]; values are single ones or [n]."""
    one = np.ones_like(places)
    found = [one * space, places, *(one * (value if np.ndim(value) == 0 else value[:, None]) for value in values)]
    return np.stack([column.ravel() for column in found], 1)


_NAMES = {SHARED: "shared", GLOBAL: "global", TENSOR: "tensor"}


def unordered(run: Run) -> Iterator[str]:
    """Between warps without a barrier, within a warp without one of it, and while a copy or product is under way."""
    if not run.rows:
        return
    rows = np.concatenate(run.rows)
    space, place, warp, lane, barriers, warp_barriers, write, time = rows.T
    for keys, actor, what in (
        ((space, place, barriers), warp, "by several warps, no barrier between"),
        ((space, place, barriers, warp, warp_barriers), lane, "by several threads of a warp, no bar.warp.sync between"),
    ):
        order = np.lexsort(keys[::-1])
        new = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
        starts = np.concatenate([[0], np.flatnonzero(new) + 1])
        low, high = (function.reduceat(actor[order], starts) for function in (np.minimum, np.maximum))
        first, last = (function.reduceat(time[order], starts) for function in (np.minimum, np.maximum))
        bad = (low != high) & (np.maximum.reduceat(write[order], starts) > 0) & (first != last)
        bad &= keys[0][order][starts] != TENSOR if actor is lane else True
        for number in np.unique(space[order][starts][bad]):
            count = int((bad & (space[order][starts] == number)).sum())
            yield f"{count} places of {_NAMES[int(number)]} memory touched {what}"
    if not run.flights:
        return
    flights, of_issuer = np.concatenate(run.flights), np.isin(warp, list(run.issuers))
    for number in np.unique(flights[:, 0]):
        for written in (True, False):  # a write under way bears no access, a read no write
            spans = flights[(flights[:, 0] == number) & (flights[:, 4] == written)]
            chosen = (space == number) & (warp != _ASYNC) & ((write > 0) | written)
            count = _within(place, time, chosen, spans[:, 1], spans[:, 2] + 1, spans[:, 3])
            count += _within(place, time, chosen & ~of_issuer, spans[:, 1], spans[:, 5], spans[:, 2] + 1)
            if count:
                yield f"{count} places of {_NAMES[int(number)]} memory touched while a copy or product is under way"


def _within(place: Array, time: Array, chosen: Array, places: Array, first: Array, last: Array) -> int:
    """How many of `places` are touched from their `first` time to before their `last`."""
    known = np.sort(place[chosen] << 24 | time[chosen])
    at = places << 24
    return int((np.searchsorted(known, at | last) > np.searchsorted(known, at | first)).sum())
