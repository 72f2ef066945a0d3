"""Search for the fastest tiles on the GPU at hand: what `effformer bench tune` does.

Every question that the launchers of a network ask the table of configurations is tuned by itself. Candidates are
compiled and audited in processes of their own, all of them before any is timed. What is left must be accurate, write
all of its output and repeat itself, and is timed once; the best few are then timed in turns with the table's own. What
came of a candidate goes into a state file at once, so that a search that was interrupted goes on where it stopped.
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

from ...apps.verify import draw
from ...apps.verify_report import Check
from ...kernels.conv_norm import GATHERED
from ...kernels.launch import Launch, recorded
from ...kernels.tiling.choose import Question, answer, asked, fingerprint, preferring
from ...kernels.tiling.device import Device, device_class, device_of
from ...kernels.tiling.table import (
    DIMENSIONS,
    DTYPES,
    AttentionConfig,
    Config,
    Entry,
    HeadConfig,
    LinearConfig,
    MlpConfig,
    NormConfig,
    PoolConfig,
    SplitConfig,
    read_config,
)
from ...testing import accuracy, float32_as_such, unwritten_is_nan
from ..measure.timing import kernel_time
from .audit import Job, audit, compilers

REPEATS = 10
FINALISTS, ROUNDS = 4, 5
GAIN = 0.98  # of the time that the table's own configuration takes: less than 2% is noise
FEW_ROWS = 4096  # with more, the parts of a split MLP are more to read and write than the GPU gains by them
FUSED = ("meta4d", "conv_mlp", "linear_mlp", "head")


class DeviceLostError(RuntimeError):
    """A candidate broke the device for this process. The state says which: the next search leaves it out."""


def describe(question: Question) -> str:
    """A question in words."""
    operation, dtype, sizes = question
    named = ", ".join(f"{name} {size}" for name, size in zip(DIMENSIONS[operation], sizes, strict=True))
    return f"{operation} {_name(dtype)}, {named}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def entry_of(question: Question, use: Config | None, device: Device) -> Entry:
    """The entry that answers this question alone, on this very card."""
    operation, dtype, sizes = question
    where = tuple((name, "=", size) for name, size in zip(DIMENSIONS[operation], sizes, strict=True))
    return Entry((operation,), (device_class(device),), (dtype,), where, use, device.name)


def question_of(launch: Launch) -> Question:
    """The question whose answer gave this launch its tiles."""
    constants = launch.constants
    arguments: dict[str, Any] = dict(launch.arguments)
    rows: int = arguments.get("rows", 0)
    sizes: tuple[int, ...]
    match launch.kernel.fn.__name__:
        case "mlp_kernel":
            operation = "meta4d" if constants["POOL"] else "conv_mlp"
            source, sizes = "weight1_ptr", (constants["C"], rows)
        case "split_mlp_kernel":
            operation = "meta4d" if constants["POOL"] else "conv_mlp" if constants["HAS_SCALE"] else "linear_mlp"
            source, sizes = "weight1_ptr", (constants["C"], rows)
        case "split_sum_kernel":
            operation, source, sizes = "split_sum", "out_ptr", (constants["C"], rows)
        case "linear_kernel":
            operation, source, sizes = "linear", "weight_ptr", (constants["OUTPUTS"], constants["INPUTS"], rows)
        case "conv_norm_kernel":
            inputs = min(constants["C"], GATHERED) if constants["GATHER"] else constants["C"]
            operation, source, sizes = "conv_norm", "weight_ptr", (constants["OUTPUTS"], inputs, rows)
        case "bias_attention_kernel":
            width = max(constants["KEY_DIM"], constants["BLOCK_V"])
            operation, source, sizes = "bias_attention", "qkv_ptr", (arguments["N"], width)
        case "pool_mixer_kernel":
            operation, source, sizes = "pool_mixer", "x_ptr", (constants["C"], int(arguments["stride_xc"] == 1), rows)
        case "head_kernel":
            images = launch.grid // -(-constants["CLASSES"] // constants["BLOCK_N"])
            operation, source, sizes = "head", "weight_ptr", (constants["C"], constants["CLASSES"], images)
        case "token_mean_kernel":
            operation, source, sizes = "token_mean", "x_ptr", (constants["C"], launch.grid)
        case _:
            operation, source, sizes = "layer_norm", "x_ptr", (constants["C"], rows)
    return operation, arguments[source].dtype, sizes


def candidates(question: Question) -> Iterator[Config | None]:
    """All that is worth compiling for a question; what a GPU has no room for is left to the audit.

    A hundred at most, by what compiling showed: 128 rows by 4 warps spill, one tile needs no pipeline.
    """
    operation, dtype, sizes = question
    match operation:
        case "meta4d" | "conv_mlp" | "linear_mlp":
            yield None
            if sizes[1] <= FEW_ROWS and dtype != torch.float32:
                yield from _splits(sizes[0])
            if operation == "linear_mlp":
                return
            rows = [(64, 4), (64, 8), (128, 8)] if dtype != torch.float32 else [(32, 4), (32, 8), (64, 8)]
            hidden = (32, 64, 128) if dtype != torch.float32 else (16, 32, 64)
            for (block_m, warps), block_h, reload, stages in itertools.product(rows, hidden, (False, True), (1, 2, 3)):
                if block_m * sizes[0] <= 128 * 256:
                    yield MlpConfig(block_m, block_h, reload, warps, stages)
        case "linear" | "conv_norm":
            if operation == "conv_norm" and dtype != torch.float32:  # where cuDNN may take TF32 for it
                yield None
            tiles = [(64,), (128,), (256,), (128, 128), (128, 64), (128, 64, 32), (128, 32), (256, 64)]
            fitting = [widths for widths in tiles if -(-sizes[0] // sum(widths)) * sum(widths) <= 1.15 * sizes[0]]
            depths = ((32, 3), (32, 4), (64, 3), (64, 4)) if dtype != torch.float32 else ((16, 3), (32, 2), (32, 3))
            for block_m, widths, (block_k, stages) in itertools.product((64, 128), fitting or [(128,)], depths):
                for warps in (4, 8) if block_m * sum(widths) <= 128 * 128 else (8,):
                    yield LinearConfig(block_m, widths, block_k, warps, stages)
        case "bias_attention":
            most = max(16, 2 * sizes[0])
            for block_m, block_n, warps in itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (2, 4, 8)):
                for stages in (1,) if block_n >= sizes[0] else (1, 2):
                    if block_m <= most and block_n <= most:
                        yield AttentionConfig(block_m, block_n, warps, stages)
        case "pool_mixer" | "split_sum":
            for elements, block_c, warps in itertools.product((512, 1024, 2048, 4096), (8, 16, 32, 64), (2, 4, 8)):
                yield PoolConfig(elements, block_c, warps)
        case "head":
            yield None
            sizes_of_tiles, classes = (8192, 16384, 32768), (8, 16, 32, 64, 128)
            for elements, block_n, warps in itertools.product(sizes_of_tiles, classes, (4, 8, 16)):
                if elements <= 2048 * warps:
                    yield HeadConfig(elements, block_n, warps)
        case "token_mean":
            for elements, warps in itertools.product((4096, 8192, 16384, 32768), (4, 8, 16)):
                yield NormConfig(elements, warps)
        case _:
            for elements, warps in itertools.product((512, 1024, 2048, 4096), (1, 2, 4, 8)):
                yield NormConfig(elements, warps)


def _splits(channels: int) -> Iterator[SplitConfig]:
    for block_m, block_h, chunk in itertools.product((16, 32, 64), (32, 64), (32, 64, 128, 256)):
        for stages in (1, 2) if chunk > block_h else (1,):  # a chunk that is one tile needs no pipeline
            if chunk >= block_h:
                yield SplitConfig(block_m, block_h, chunk, 4 if block_m * channels <= 16 * 512 else 8, stages)


@dataclass(frozen=True)
class Tuned:
    """The outcome of one question.

    Attributes:
        own: the table's own configuration.
        use: the fastest; `own` unless another takes less than `GAIN` of its time, or `own` fails.
        ms, own_ms: device time with each, medians of `ROUNDS` rounds; None if it fails.
        tried: configurations that were timed.
        refused: reason -> number of configurations that were not.
        fault: what is wrong with `own`, None if nothing is.
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
    """A file of what came of candidates and questions, a JSON record a line.

    What another GPU, other kernels or another Triton gave does not count, nor does the outcome of a question to which
    the table now has another answer. A candidate that was begun and not finished took its process down: it is refused.
    """

    def __init__(self, path: Path, device: Device) -> None:
        self.path, self.device = path, device
        self.owner = {"gpu": device.name, **fingerprint()}
        self.trials: dict[Question, dict[Config | None, float | str]] = {}
        self.tuned: dict[Question, Tuned] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a line that was cut off when the time was up
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                if record["owner"] == self.owner:
                    self._take(record)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: no outcome of a search ({error}): delete the file") from error

    def _take(self, record: dict[str, Any]) -> None:
        operation, dtype, sizes = record["question"]
        question = operation, DTYPES[dtype], tuple(sizes)

        def config(name: str) -> Config | None:
            return read_config(record[name], [operation], self.path.name)

        if "trial" in record:
            self.trials.setdefault(question, {})[config("use")] = record["trial"]
            return
        with preferring():
            own = answer(operation, question[1], self.device, *question[2])
        if config("own") == own:
            found = {name: record[name] for name in ("ms", "own_ms", "tried", "refused", "fault")}
            self.tuned[question] = Tuned(question, own, config("use"), **found)

    def note(self, question: Question, use: Config | None, trial: float | str) -> None:
        """Milliseconds of a candidate, or why it is refused."""
        self.trials.setdefault(question, {})[use] = trial
        self._append(question, {"use": _plain(use), "trial": trial})

    def add(self, tuned: Tuned) -> None:
        self.tuned[tuned.question] = tuned
        found = {**asdict(tuned), "own": _plain(tuned.own), "use": _plain(tuned.use)}
        self._append(tuned.question, {name: value for name, value in found.items() if name != "question"})

    def _append(self, question: Question, record: dict[str, Any]) -> None:
        operation, dtype, sizes = question
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"owner": self.owner, "question": [operation, _name(dtype), sizes], **record}) + "\n")

    def entries(self, gpu: str | None) -> list[Entry]:
        """Entries for what was tuned, for one card or (None) its device class.

        A number of rows stands for all up to it, the largest that was tuned for all beyond. Where the table's own
        configuration was the best for all numbers of rows, there is none.
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


def _plain(use: Config | None) -> dict[str, Any] | None:
    return None if use is None else asdict(use)


def tune(
    todo: Sequence[Check],
    device: torch.device,
    state: State,
    *,
    seconds: float,
    workers: int,
    cache: Path | None = None,
    timer: Callable[[Callable[[], object], torch.device], float] = kernel_time,
    propose: Callable[[Question], Iterable[Config | None]] = candidates,
) -> Iterator[Tuned | None]:
    """Answer the questions of `todo` that `state` has no answer to, for up to `seconds`; a last None says: not done.

    Args:
        todo: of `effformer.apps.verify.checks`; whole networks ask nothing of their own.
        device: where to run.
        state: takes every outcome as soon as it is there.
        seconds: after which nothing is begun any more; what is under way then takes a few more.
        workers: processes that compile.
        cache: folder for what compiling found, see `offline.compile_source`.
        timer: milliseconds that a callable takes on a device.
        propose: what to try for a question, beside the table's own configuration.

    Raises:
        DeviceLostError: where a candidate broke the device.
    """
    deadline = time.monotonic() + seconds
    with compilers(workers) as pool:
        for check in todo:
            subject = draw(check, device)
            with preferring(), recorded(run=False), asked() as questions:
                subject.run("triton")
            # The products that a fused MLP (or head) competes with are tuned before it.
            unknown = sorted(
                set(questions) - set(state.tuned), key=lambda question: (question[0] in FUSED, repr(question))
            )
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
            own: Config | None = answer(question[0], question[1], self.device, *question[2])
        tried = self._distinct(question, [own, *proposed])
        trials = self.state.trials.setdefault(question, {})
        new = [use for use in tried if use not in trials]
        jobs = {use: [self._job(question, launch) for launch in self._launches(question, use)] for use in new}
        records = {use: [self.pool.submit(audit, job, self.cache) for job in jobs[use]] for use in new}
        # Compiling keeps the cores from launching in time: nothing is timed beside it.
        pending = wait(itertools.chain.from_iterable(records.values()), max(0.0, self.deadline - time.monotonic()))
        if pending.not_done:
            return None
        for use in new:
            if time.monotonic() > self.deadline:
                return None
            if any(record.result().faults for record in records[use]):
                self.state.note(question, use, "refused by the audit")
                continue
            self.state.note(question, use, "broke off")  # which stands if this process does not come back
            self.state.note(question, use, self._wrong(question, use) or self._time(question, use))
        times = {use: trial for use in tried if isinstance(trial := trials[use], float)}
        refused = Counter(trial for use in tried if isinstance(trial := trials[use], str))
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

    def _distinct(self, question: Question, proposed: Iterable[Config | None]) -> list[Config | None]:
        """Of those that lead to the same launches the first: tiles shrink to small shapes."""
        found: dict[str, Config | None] = {}
        for use in proposed:
            launches = self._launches(question, use)
            found.setdefault(repr([(launch.kernel, launch.configuration) for launch in launches]), use)
        return list(found.values())

    def _launches(self, question: Question, use: Config | None, *, run: bool = False) -> list[Launch]:
        """What `use` launches that concerns the question: for an MLP or the head all, since it may be fused or not."""
        with recorded(run=run) as launches:
            self._result(question, use)
        if question[0] in FUSED:
            return launches
        return [launch for launch in launches if question_of(launch) == question]

    def _result(self, question: Question, use: Config | None) -> Tensor:
        with preferring(entry_of(question, use, self.device), *self.state.entries(self.device.name)):
            result: Tensor = self.subject.run("triton")
        return result

    def _job(self, question: Question, launch: Launch) -> Job:
        return Job.of(question[0], [describe(question)], _name(question[1]), self.device, launch)

    def _wrong(self, question: Question, use: Config | None) -> str | None:
        """Why the results with `use` are not to be had, or None."""
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
                except RuntimeError:  # nothing that this process computes from now on would mean anything
                    raise DeviceLostError(f"{describe(question)}: {use} broke the device: {error}") from error
            return f"failing ({type(error).__name__})"
        return None

    def _time(self, question: Question, use: Config | None) -> float:
        launches = self._launches(question, use, run=True)

        def call() -> None:
            for launch in launches:
                launch.run()

        return self.timer(call, self.torch_device)


def merged(entries: Iterable[Entry], table: Iterable[Entry]) -> list[Entry]:
    """A table with `entries` first, less those that they replace: same operations, devices, dtypes and conditions."""
    entries = list(entries)
    new = {replace(entry, use=None, source="") for entry in entries}
    return entries + [entry for entry in table if replace(entry, use=None, source="") not in new]
