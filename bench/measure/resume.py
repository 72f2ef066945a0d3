"""The results file of one run: a provider that is recorded for this setup is not measured again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from .records import Key, Machine, Record, append_records, read_records

MOST_ATTEMPTS = 2


class FailedError(RuntimeError):
    """A provider gave no result; the message is the reason."""


class DeviceLostError(FailedError):
    """A provider broke the device for this process. The outcome is recorded: the next run goes on without it."""


class ResultsFile:
    """The records of this setup (machine, versions, code) in a file, to which a run adds its own.

    Each record is written at once, so that the next run goes on where this one stopped.

    Args:
        path: of the file; it need not exist. Records of other setups stay in it.
        machine: the setup. Its date is that of all records of this run.
        deadline: of `time.monotonic()`, after which no provider is started.
    """

    def __init__(self, path: Path, machine: Machine, deadline: float = math.inf) -> None:
        self.path, self.machine, self.deadline = path, machine, deadline
        self._known: dict[Key, list[Record]] = {}
        self._take(record for record in read_records(path) if record.machine.setup == machine.setup)

    def records(self, key: Key) -> list[Record]:
        """A measurement's results so far: of each provider and metric the last."""
        found = {(r.provider, r.metric): r for r in self._known.get(key, ()) if r.metric != "begun"}
        return list(found.values())

    def providers(self, key: Key) -> set[str]:
        """The providers with a result: the last of their records, so that none is missing."""
        return {record.provider for record in self.records(key) if record.metric in ("ms", "not run")}

    def add(self, records: Iterable[Record]) -> None:
        """Write records, a provider's time after its other figures."""
        records = sorted(records, key=lambda record: record.metric == "ms")
        append_records(self.path, records)
        self._take(records)

    def measure(self, begun: Record, run: Callable[[], list[Record]], why_not: str | None = None) -> bool:
        """Record one provider's results, unless they are recorded; False if the time is over.

        A provider that raises TimeoutError is started a second time, with the code that it has compiled. One that takes
        the process down is started again by the next run. After two starts it is recorded as not run.

        Args:
            begun: the record that says that the provider was started, with the metric "begun".
            run: measures it.
            why_not: why it cannot be run.

        Raises:
            DeviceLostError: as `run` does.
        """
        if begun.provider in self.providers(begun.key):
            return True
        if why_not is not None:
            self.add([replace(begun, metric="not run", why=why_not)])
            return True
        while self._attempts(begun) < MOST_ATTEMPTS:
            if time.monotonic() > self.deadline:
                return False
            self.add([begun])
            try:
                self.add(run())
            except TimeoutError:
                continue
            except FailedError as error:
                self._fail(begun, str(error))
                if isinstance(error, DeviceLostError):
                    raise
            except BaseException:  # such as Ctrl-C, which is not the provider's fault
                self.add([replace(begun, why="stopped from outside")])
                raise
            return True
        self._fail(begun, f"it was started {MOST_ATTEMPTS} times, and took too long or broke the process")
        return True

    def _attempts(self, begun: Record) -> int:
        found = [r.why for r in self._known.get(begun.key, ()) if (r.provider, r.metric) == (begun.provider, "begun")]
        return 2 * found.count(None) - len(found)

    def _fail(self, begun: Record, reason: str) -> None:
        details = {**begun.details, "failed": [reason]}
        self.add([replace(begun, metric="not run", why=reason, details=details)])

    def _take(self, records: Iterable[Record]) -> None:
        for record in records:
            self._known.setdefault(record.key, []).append(record)


def failures(records: Iterable[Record]) -> list[str]:
    """Errors of our own kernels and networks in these records, in words."""
    found = []
    for record in records:
        name = f"{record.op} {'x'.join(map(str, record.shape))} {record.dtype}, {record.provider}"
        if record.provider.startswith("ours") and record.metric == "not run" and "failed" in record.details:
            found.append(f"{name}: {record.why}")
        if record.provider.startswith("ours") and record.details.get("within the rule") is False:
            found.append(f"{name}: inaccurate, see `effformer verify`")
    return found
