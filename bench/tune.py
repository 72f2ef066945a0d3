"""Search for the fastest tiles on the GPU at hand: what `effformer bench tune` does.

Every question that the launches of a network ask the table of configurations is tuned by itself: candidates are
compiled and audited in processes of their own, what is left must be accurate and repeatable, and is timed. Outcomes go
into a state file one by one, so that a search that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ..kernels import config
from ..kernels.config import (
    fingerprint,
    preferring,
    read_user_entries,
    shipped_table,
    user_file,
    write_user_entries,
)
from ..kernels.device import Device, device_class, device_of
from ..kernels.launch import INTERPRETED, Launch, recorded
from ..kernels.table import (
    DIMENSIONS,
    DTYPES,
    AttentionConfig,
    Config,
    Entry,
    LinearConfig,
    MlpConfig,
    NormConfig,
    PoolConfig,
    as_text,
    read_config,
)
from ..ops import why_not_triton
from ..outcome import NETWORK
from ..testing import accuracy
from ..verification import OPERATIONS, Check, checks, draw
from .audit import Job, audit, compilers
from .timing import kernel_time

REPEATS = 10
GAIN = 0.98  # of the time that the table's own configuration takes: less than 2% is noise


@dataclass(frozen=True)
class Question:
    """What a launch asked the table: sizes in the order of `DIMENSIONS[operation]`."""

    operation: str
    dtype: torch.dtype
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in zip(DIMENSIONS[self.operation], self.sizes, strict=True))
        return f"{self.operation} {str(self.dtype).removeprefix('torch.')}, {sizes}"

    def entry(self, use: Config | None, device: Device) -> Entry:
        """The entry that answers this question alone, on this very card."""
        where = tuple((name, "=", size) for name, size in zip(DIMENSIONS[self.operation], self.sizes, strict=True))
        return Entry((self.operation,), (device_class(device),), (self.dtype,), where, use, device.name)


def question_of(launch: Launch) -> Question:
    """The question whose answer gave this launch its tiles."""
    constants, arguments = launch.constants, launch.arguments
    rows = arguments.get("rows")
    match launch.kernel.fn.__name__:
        case "mlp_kernel":
            operation, source, sizes = (
                "meta4d" if constants["POOL"] else "conv_mlp",
                "weight1_ptr",
                (constants["C"], rows),
            )
        case "linear_kernel":
            operation, source, sizes = "linear", "weight_ptr", (constants["OUTPUTS"], constants["INPUTS"], rows)
        case "bias_attention_kernel":
            width = max(constants["KEY_DIM"], constants["BLOCK_V"])
            operation, source, sizes = "bias_attention", "qkv_ptr", (arguments["N"], width)
        case "pool_mixer_kernel":
            operation, source, sizes = "pool_mixer", "x_ptr", (constants["C"], int(arguments["stride_xc"] == 1), rows)
        case _:
            operation, source, sizes = "layer_norm", "x_ptr", (constants["C"], rows)
    tensor = arguments[source]
    assert isinstance(tensor, Tensor)
    return Question(operation, tensor.dtype, sizes)  # type: ignore[arg-type]


def candidates(question: Question) -> Iterator[Config | None]:
    """All that is worth compiling for a question; what a GPU has no room for is left to the audit."""
    match question.operation:
        case "meta4d" | "conv_mlp":
            yield None
            for block_m, block_h, reload, warps, stages in itertools.product(
                (32, 64, 128), (16, 32, 64, 128), (False, True), (4, 8), (1, 2, 3)
            ):
                if block_m * block_h >= 512 and block_m * question.sizes[0] <= 128 * 256:
                    yield MlpConfig(block_m, block_h, reload, warps, stages)
        case "linear":
            widths = [(64,), (128,), (256,), (128, 128), (128, 64), (128, 64, 32), (128, 32), (64, 32), (256, 64)]
            outputs = question.sizes[0]
            fitting = [width for width in widths if -(-outputs // sum(width)) * sum(width) <= 1.15 * outputs]
            yield from (
                LinearConfig(block_m, width, block_k, warps, stages)
                for block_m, width, block_k, warps, stages in itertools.product(
                    (64, 128), fitting or [(128,)], (32, 64, 128), (4, 8), (2, 3, 4)
                )
                if 32 * 64 <= block_m * sum(width) <= 128 * 320
            )
        case "bias_attention":
            yield from (
                AttentionConfig(block_m, block_n, warps, stages)
                for block_m, block_n, warps, stages in itertools.product(
                    (16, 32, 64, 128), (16, 32, 64, 128), (2, 4, 8), (1, 2, 3)
                )
                if 16 <= block_m <= max(16, 2 * question.sizes[0]) and block_n <= max(16, 2 * question.sizes[0])
            )
        case "pool_mixer":
            yield from itertools.starmap(
                PoolConfig, itertools.product((512, 1024, 2048, 4096), (8, 16, 32, 64), (2, 4, 8))
            )
        case _:
            yield from itertools.starmap(NormConfig, itertools.product((512, 1024, 2048, 4096), (1, 2, 4, 8)))


@dataclass(frozen=True)
class Tuned:
    """The outcome of one question.

    Attributes:
        use: the fastest configuration; the table's own unless another takes less than `GAIN` of its time.
        ms, table_ms: device time with `use`, and with the table's own configuration.
        tried: configurations that were timed.
        refused: reason -> number of configurations that were not.
    """

    question: Question
    use: Config | None
    ms: float
    table_ms: float
    tried: int
    refused: dict[str, int]

    def __str__(self) -> str:
        refused = "".join(f", {number} {reason}" for reason, number in self.refused.items())
        times = f"{1e3 * self.table_ms:.1f} -> {1e3 * self.ms:.1f} us"
        return f"{self.question}: {times}, {self.use}; {self.tried} timed{refused}"


class State:
    """A file of outcomes, a JSON record a line, of which those count that this GPU and these kernels gave."""

    def __init__(self, path: Path, device: Device) -> None:
        self.path, self.device = path, device
        self.tuned: dict[Question, Tuned] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if record["owner"] == self._owner():
                    found = _read(record["tuned"], f"{path}, line {number}")
                    self.tuned[found.question] = found
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: no outcome of a search ({error}): delete the file") from error

    def add(self, tuned: Tuned) -> None:
        self.tuned[tuned.question] = tuned
        self.path.parent.mkdir(parents=True, exist_ok=True)
        question = {**asdict(tuned.question), "dtype": str(tuned.question.dtype).removeprefix("torch.")}
        record = {"owner": self._owner(), "tuned": asdict(tuned) | {"question": question}}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _owner(self) -> dict[str, str]:
        return {"gpu": self.device.name, **fingerprint()}

    def entries(self, gpu: str | None) -> list[Entry]:
        """Entries for what was tuned, for one card or (None) its device class.

        A number of rows stands for all up to it, the largest that was tuned for all beyond. Where the table's own
        configuration was the best for all numbers of rows, there is none.
        """
        groups: dict[tuple[str, torch.dtype, tuple[int, ...]], list[Tuned]] = {}
        for tuned in self.tuned.values():
            question = tuned.question
            sizes = question.sizes[:-1] if "rows" in DIMENSIONS[question.operation] else question.sizes
            groups.setdefault((question.operation, question.dtype, sizes), []).append(tuned)
        found = []
        for (operation, dtype, sizes), group in groups.items():
            if all(tuned.ms >= tuned.table_ms for tuned in group):
                continue
            where = tuple((name, "=", size) for name, size in zip(DIMENSIONS[operation], sizes, strict=False))
            ordered = sorted(group, key=lambda tuned: tuned.question.sizes)
            for tuned in ordered:
                last = tuned is ordered[-1]
                bound = () if last else (("rows", "<=", tuned.question.sizes[-1]),)
                found.append(Entry((operation,), (device_class(self.device),), (dtype,), where + bound, tuned.use, gpu))
        return found


def _read(found: dict[str, Any], source: str) -> Tuned:
    question = found["question"]
    asked = Question(question["operation"], DTYPES[question["dtype"]], tuple(question["sizes"]))
    use = read_config(found["use"], asked.operation, source)
    return Tuned(asked, use, found["ms"], found["table_ms"], found["tried"], found["refused"])


def tune(
    todo: Sequence[Check],
    device: torch.device,
    state: State,
    *,
    seconds: float,
    workers: int | None = None,
    timer: Callable[[Callable[[], object], torch.device], float] = kernel_time,
    propose: Callable[[Question], Iterable[Config | None]] = candidates,
) -> Iterator[Tuned | None]:
    """Answer the questions of `todo` that `state` has no answer to, for up to `seconds`; a last None says: not done.

    Args:
        todo: of `effformer.verification.checks`; whole networks ask nothing of their own.
        device: where to run.
        state: takes every outcome as soon as it is there.
        workers: processes that compile; default: one for each core.
        timer: milliseconds that a callable takes on a device.
        propose: what to try for a question, beside the table's own configuration.
    """
    deadline = time.monotonic() + seconds
    with compilers(workers or os.cpu_count() or 1) as pool:
        for check in todo:
            subject = draw(check, device)
            with preferring(), recorded(run=False) as launches:
                subject.run("triton")
            questions = [asked for asked in dict.fromkeys(map(question_of, launches)) if asked not in state.tuned]
            if not questions:
                continue
            search = _Search(subject, subject.exact(), subject.run("eager"), device, pool, timer, deadline)
            for question in questions:
                tuned = search.run(question, propose(question))
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
    pool: Executor
    timer: Callable[[Callable[[], object], torch.device], float]
    deadline: float

    @property
    def device(self) -> Device:
        return device_of(self.torch_device)

    def run(self, question: Question, proposed: Iterable[Config | None]) -> Tuned | None:
        """The outcome, or None if the time is over first."""
        with preferring():
            own = config.answer(question.operation, question.dtype, self.device, *question.sizes)
        tried = list(dict.fromkeys([own, *proposed]))
        refused: Counter[str] = Counter()
        times: dict[Config | None, float] = {}
        for use, faults in zip(tried, self._audited(question, tried), strict=True):
            if time.monotonic() > self.deadline:
                return None
            if faults and use != own:
                refused["refused by the audit"] += 1
            elif reason := self._wrong(question, use):
                refused[reason] += 1
            else:
                times[use] = self._time(question, use)
        if own not in times:
            raise RuntimeError(f"{question}: the table's own configuration fails: {own}, {dict(refused)}")
        best = min(times, key=lambda use: times[use])
        use = best if times[best] < GAIN * times[own] else own
        return Tuned(question, use, times[use], times[own], len(times), dict(refused))

    def _launches(self, question: Question, use: Config | None, *, run: bool) -> tuple[list[Launch], Tensor]:
        """What `use` launches that concerns the question: for an MLP all, since it may be fused or not."""
        with preferring(question.entry(use, self.device)), recorded(run=run) as launches:
            result: Tensor = self.subject.run("triton")
        if question.operation in ("meta4d", "conv_mlp"):
            return launches, result
        return [launch for launch in launches if question_of(launch) == question], result

    def _audited(self, question: Question, tried: Sequence[Config | None]) -> Iterator[bool]:
        dtype = str(question.dtype).removeprefix("torch.")
        groups = [
            [
                Job.of(question.operation, [str(question)], dtype, self.device, launch)
                for launch in self._launches(question, use, run=False)[0]
            ]
            for use in tried
        ]
        records = [[self.pool.submit(audit, job) for job in group] for group in groups]
        for group in records:
            yield any(record.result().faults for record in group)

    def _wrong(self, question: Question, use: Config | None) -> str | None:
        """Why the results with `use` are not to be had, or None."""
        try:
            _, result = self._launches(question, use, run=True)
            if not accuracy(result, self.exact, self.eager).passes():
                return "inaccurate"
            for _ in range(REPEATS):
                if not torch.equal(self._launches(question, use, run=True)[1], result):
                    return "not repeatable"
        except RuntimeError as error:  # what Triton raises for want of resources is one
            return f"failing ({type(error).__name__})"
        return None

    def _time(self, question: Question, use: Config | None) -> float:
        launches, _ = self._launches(question, use, run=True)

        def call() -> None:
            for launch in launches:
                launch.run()

        return self.timer(call, self.torch_device)


def merged(entries: Iterable[Entry], table: Iterable[Entry]) -> list[Entry]:
    """A table with `entries` first, less those that they replace: same operations, devices, dtypes and conditions."""
    entries = list(entries)
    new = {replace(entry, use=None, source="") for entry in entries}
    return entries + [entry for entry in table if replace(entry, use=None, source="") not in new]


# --- the command ------------------------------------------------------------------------------------------------------


def command(
    models: Sequence[str],
    dtypes: Sequence[torch.dtype],
    batch_sizes: Sequence[int],
    size: tuple[int, int],
    device: torch.device,
    *,
    minutes: float,
    in_place: Path | None,
) -> int:
    """`effformer bench tune`: 0 when all is tuned, 75 (try again) when the time was over first.

    Raises:
        ValueError: if `device` is no GPU that the kernels run on.
    """
    if reason := (why_not_triton(device) or ("Triton interprets here" if INTERPRETED else None)):
        raise ValueError(f"--device: got {device}, allowed is a GPU that the kernels run on: {reason}")
    found = device_of(device)
    state = State(user_file().with_name("tuning.jsonl"), found)
    operations = [name for name in OPERATIONS if name != NETWORK]
    todo = [
        check
        for batch in sorted(batch_sizes, reverse=True)
        for check in checks(models, operations, dtypes, size=size, batch_size=batch)
    ]
    print(f"{found.name}, {device_class(found)}, triton {triton.__version__}; outcomes go to {state.path}", flush=True)
    done = True
    for tuned in tune(todo, device, state, seconds=60 * minutes):
        done = tuned is not None
        print(tuned if tuned else "the time is over: the same command goes on from here", flush=True)
    if in_place is None:
        write_user_entries(user_file(), _other_cards(found) + state.entries(found.name))
        print(f"written: {user_file()}")
    else:
        in_place.write_text(as_text(merged(state.entries(None), shipped_table().entries)), encoding="utf-8")
        print(f"written: {in_place}")
    return 0 if done else os.EX_TEMPFAIL


def _other_cards(device: Device) -> list[Entry]:
    """What the user's file holds for other cards of this machine."""
    return [entry for entry in read_user_entries(user_file()) if entry.gpu != device.name]
