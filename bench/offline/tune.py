"""Search for the fastest tiles on this GPU: the work of `effformer bench tune`.

Every question that the launchers of a network ask the table of configurations is tuned by itself. Other processes
compile and audit all candidates before any is timed. Those that pass must be accurate, write all of their output and
give the same bits each time. They are timed once, and the best few again, in turns with the table's own. Each outcome
goes into a state file at once, so that an interrupted search goes on where it stopped.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...accuracy import accuracy
from ...apps.verify import draw
from ...apps.verify_report import Check, describe_dtype
from ...files import write_whole
from ...kernels.launch import Launch, recorded
from ...kernels.tiling.choose import Question, answer, asked, fingerprint, preferring
from ...kernels.tiling.device import Device, device_class, device_of
from ...kernels.tiling.table import DIMENSIONS, DTYPES, Config, Entry, read_config
from ...testing import float32_as_such, unwritten_is_nan
from ..measure.resume import DeviceLostError as DeviceLostError
from ..measure.timing import kernel_time
from .audit import Job, audit
from .candidates import candidates
from .workers import compilers

REPEATS = 10
FINALISTS, ROUNDS = 4, 5
GAIN = 0.98  # of the time of the table's own configuration: less than 2% is noise
FUSED = ("meta4d", "conv_mlp", "linear_mlp", "head")  # or, by the table's choice, several launches


def describe(question: Question) -> str:
    """A question in words."""
    operation, dtype, sizes = question
    named = ", ".join(f"{name} {size}" for name, size in zip(DIMENSIONS[operation], sizes, strict=True))
    return f"{operation} {describe_dtype(dtype)}, {named}"


def write_user_entries(path: Path, entries: Iterable[Entry]) -> None:
    """Write the file that `read_user_entries` reads."""
    found = {"fingerprint": fingerprint(), "entries": [entry.as_json() for entry in entries]}
    write_whole(path, json.dumps(found, indent=1) + "\n")


def entry_of(question: Question, use: Config | None, device: Device) -> Entry:
    """An entry for this question and this card alone."""
    operation, dtype, sizes = question
    where = tuple((name, "=", size) for name, size in zip(DIMENSIONS[operation], sizes, strict=True))
    return Entry((operation,), (device_class(device),), (dtype,), where, use, device.name)


@dataclass(frozen=True)
class Tuned:
    """The outcome of one question.

    Attributes:
        own: the table's own configuration.
        use: the fastest; `own` unless another takes less than `GAIN` of its time, or `own` fails.
        ms, own_ms: device time of `use` and `own`, medians of `ROUNDS` rounds; None if it fails.
        tried: number of configurations that were timed.
        refused: reason -> number of configurations that were not.
        fault: the reason why `own` fails, or None.
    """

    question: Question
    own: Config | None
    use: Config | None
    ms: float | None
    own_ms: float | None
    tried: int
    refused: dict[str, int]
    fault: str | None = None

    @property
    def better(self) -> bool:
        return self.use != self.own

    def __str__(self) -> str:
        refused = "".join(f", {number} {reason}" for reason, number in self.refused.items())
        own, ms = (f"{1e3 * ms:.1f}" if ms is not None else "-" for ms in (self.own_ms, self.ms))
        fault = f"; THE TABLE'S OWN CONFIGURATION FAILS: {self.own}: {self.fault}" if self.fault else ""
        return f"{describe(self.question)}: {own} -> {ms} us, {self.use}; {self.tried} timed{refused}{fault}"


class State:
    """A file with the outcomes of candidates and questions, a JSON record a line.

    Outcomes of another GPU, other kernels or another Triton do not count. Neither does the outcome of a question whose
    answer in the table has changed. A candidate that was begun and never finished took its process down: it is refused.
    """

    def __init__(self, path: Path, device: Device) -> None:
        self.path, self.device = path, device
        self.owner = {"gpu": device.name, **fingerprint()}
        self.trials: dict[Question, dict[Config | None, float | str]] = {}
        self.tuned: dict[Question, Tuned] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # the last line may be cut off
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                if record["owner"] == self.owner:
                    self._take(record)
            except (KeyError, TypeError, ValueError) as error:
                reason = f"not an outcome of a search ({error}): delete the file"
                raise ValueError(f"{path}, line {number}: {reason}") from error

    def _take(self, record: dict[str, Any]) -> None:
        operation, dtype, sizes = record["question"]
        question = Question(operation, DTYPES[dtype], tuple(sizes))

        def config(name: str) -> Config | None:
            return read_config(record[name], [operation], self.path.name)

        if "trial" in record:
            self.trials.setdefault(question, {})[config("use")] = record["trial"]
            return
        with preferring():
            own = answer(question, self.device)
        if config("own") == own:
            found = {name: record[name] for name in ("ms", "own_ms", "tried", "refused", "fault")}
            self.tuned[question] = Tuned(question, own, config("use"), **found)

    def note(self, question: Question, use: Config | None, trial: float | str) -> None:
        """Note the milliseconds of a candidate, or the reason why it is refused."""
        self.trials.setdefault(question, {})[use] = trial
        self._append(question, {"use": None if use is None else asdict(use), "trial": trial})

    def add(self, tuned: Tuned) -> None:
        self.tuned[tuned.question] = tuned
        self._append(tuned.question, asdict(tuned))

    def _append(self, question: Question, record: dict[str, Any]) -> None:
        operation, dtype, sizes = question
        record |= {"owner": self.owner, "question": [operation, describe_dtype(dtype), sizes]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def entries(self, gpu: str | None) -> list[Entry]:
        """Entries for what was tuned, for one card or (None) its device class.

        The outcome for a number of rows also holds for fewer, and that for the largest number for more. There is no
        entry where the table's own configuration was the best for all numbers of rows.
        """
        groups: dict[tuple[str, torch.dtype, tuple[int, ...]], list[Tuned]] = {}
        for (operation, dtype, sizes), tuned in self.tuned.items():
            sizes = sizes[:-1] if "rows" in DIMENSIONS[operation] else sizes
            groups.setdefault((operation, dtype, sizes), []).append(tuned)
        found = []
        for (operation, dtype, sizes), group in groups.items():
            if not any(tuned.better for tuned in group):
                continue
            where = tuple((name, "=", size) for name, size in zip(DIMENSIONS[operation], sizes, strict=False))
            *others, last = sorted(group, key=lambda tuned: tuned.question[2])
            bounds = [(tuned, (("rows", "<=", tuned.question[2][-1]),)) for tuned in others]
            for tuned, bound in [*bounds, (last, ())]:
                devices = (device_class(self.device),)
                found.append(Entry((operation,), devices, (dtype,), where + bound, tuned.use, gpu))
        return found


def tune(
    todo: Sequence[Check],
    device: torch.device,
    state: State,
    *,
    seconds: float,
    workers: int,
    cache: Path | None = None,
    timer: Callable[[Callable[[], object], torch.device], float] = kernel_time,
    propose: Callable[[Question, Device], Iterable[Config | None]] = candidates,
) -> Iterator[Tuned | None]:
    """Tune the questions of `todo` that `state` has no outcome for; a last None means that the time was over first.

    Args:
        todo: from `effformer.apps.verify.checks`; whole networks ask no questions of their own.
        device: a GPU, or the CPU under Triton's interpreter.
        state: takes every outcome at once.
        seconds: after which nothing new begins; work under way takes a few more.
        workers: processes that compile.
        cache: folder for the results of compiling, see `effformer.bench.offline.compile.compile_source`.
        timer: milliseconds that a callable takes on a device.
        propose: configurations to try for a question, beside the table's own.

    Raises:
        DeviceLostError: if a candidate broke the device. The state names it, and the next search leaves it out.
    """
    deadline = time.monotonic() + seconds
    with compilers(workers) as pool:
        for check in todo:
            subject = draw(check, device)
            with preferring(), recorded(run=False), asked() as questions:
                subject.run("triton")
            # A fused MLP or head competes with separate products: these are tuned before it.
            unknown = sorted(set(questions) - set(state.tuned), key=lambda one: (one.operation in FUSED, repr(one)))
            if not unknown:
                continue
            if time.monotonic() > deadline:
                yield None
                return
            with float32_as_such():
                search = _Search(
                    subject, subject.exact(), subject.run("eager"), device, state, pool, cache, timer, deadline
                )
                for question in unknown:
                    tuned = search.run(question, propose(question, search.device))
                    if tuned is None:
                        yield None
                        return
                    state.add(tuned)
                    yield tuned


@dataclass(frozen=True)
class _Search:
    subject: Any
    exact: Tensor
    eager: Tensor
    torch_device: torch.device
    state: State
    pool: Executor
    cache: Path | None
    timer: Callable[[Callable[[], object], torch.device], float]
    deadline: float

    @property
    def device(self) -> Device:
        return device_of(self.torch_device)

    def run(self, question: Question, proposed: Iterable[Config | None]) -> Tuned | None:
        """The outcome, or None if the time is over first."""
        with preferring():
            own: Config | None = answer(question, self.device)
        words = question.operation, [describe(question)], describe_dtype(question.dtype), self.device
        jobs: dict[Config | None, list[Job]] = {}
        for use in (own, *proposed):
            made = [Job.of(*words, launch) for launch in self._launches(question, use)]
            if made not in jobs.values():  # tiles shrink to small shapes, and several lead to the same launches
                jobs[use] = made
        trials = self.state.trials.setdefault(question, {})
        records = {
            use: [self.pool.submit(audit, job, self.cache) for job in made]
            for use, made in jobs.items()
            if use not in trials
        }
        # Compiling keeps the cores from launching in time: nothing is timed beside it.
        pending = wait(itertools.chain.from_iterable(records.values()), max(0.0, self.deadline - time.monotonic()))
        if pending.not_done:
            return None
        for use in records:
            if time.monotonic() > self.deadline:
                return None
            if any(record.result().faults for record in records[use]):
                self.state.note(question, use, "refused by the audit")
                continue
            self.state.note(question, use, "broke off")  # stays if this process dies
            self.state.note(question, use, self._wrong(question, use) or self._time(question, use))
        times = {use: trial for use in jobs if isinstance(trial := trials[use], float)}
        refused = Counter(trial for use in jobs if isinstance(trial := trials[use], str))
        fault = None if own in times else str(trials[own])
        final = [use for use in sorted(times, key=lambda use: times[use]) if use != own][:FINALISTS]
        final += [own] if own in times else []
        if not final:
            return Tuned(question, own, own, None, None, 0, dict(refused), fault)
        rounds: dict[Config | None, list[float]] = {use: [] for use in final}
        for _ in range(ROUNDS):
            for use in final:
                if time.monotonic() > self.deadline:
                    return None
                rounds[use].append(self._time(question, use))
        medians = {use: statistics.median(taken) for use, taken in rounds.items()}
        own_ms = medians.get(own)
        best = min(medians, key=lambda use: medians[use])
        use = own if own_ms is not None and medians[best] >= GAIN * own_ms else best
        return Tuned(question, own, use, medians[use], own_ms, len(times), dict(refused), fault)

    def _launches(self, question: Question, use: Config | None, *, run: bool = False) -> list[Launch]:
        """The launches with `use` that belong to the question: all of them for an MLP or a head, fused or not."""
        with recorded(run=run) as launches:
            self._result(question, use)
        return [launch for launch in launches if question.operation in FUSED or launch.question == question]

    def _result(self, question: Question, use: Config | None) -> Tensor:
        with preferring(entry_of(question, use, self.device), *self.state.entries(self.device.name)):
            result: Tensor = self.subject.run("triton")
        return result

    def _wrong(self, question: Question, use: Config | None) -> str | None:
        """The reason to refuse `use`, or None."""
        try:
            with unwritten_is_nan():
                result = self._result(question, use)
            if not accuracy(result, self.exact, self.eager).passes():
                return "inaccurate"
            if not all(torch.equal(self._result(question, use), result) for _ in range(REPEATS)):
                return "not repeatable"
        except Exception as error:  # Triton raises many kinds
            if self.torch_device.type == "cuda":
                try:
                    torch.cuda.synchronize(self.torch_device)
                except RuntimeError:  # later results of this process would mean nothing
                    raise DeviceLostError(f"{describe(question)}: {use} broke the device: {error}") from error
            return f"failing ({type(error).__name__})"
        return None

    def _time(self, question: Question, use: Config | None) -> float:
        launches = self._launches(question, use, run=True)

        def call() -> None:
            for launch in launches:
                launch.run()
            if not launches:  # the vendor's library computes it
                self._result(question, use)

        return self.timer(call, self.torch_device)


def merged(entries: Iterable[Entry], table: Iterable[Entry]) -> list[Entry]:
    """`entries`, then those of `table` with other operations, devices, dtypes or conditions."""
    entries = list(entries)
    new = {replace(entry, use=None, source="") for entry in entries}
    return entries + [entry for entry in table if replace(entry, use=None, source="") not in new]
