"""The GPU suite, in pieces: python -P tests/gpu/suite.py [--limit SECONDS] [PIECE ...], or `make gpu`

The most telling pieces run first, each a pytest call with a time limit of its own. Pieces of one process run beside
those of many; benchmarks run alone. Results are written at once, to bench/results/<gpu>/:

    suite.jsonl   a line for each run of a piece
    tests.jsonl   a line for each test, of the sources as they are now
    errors.jsonl  the worst errors by operation and dtype, beside eager's

When the time is up, another call goes on where this one stopped: tests that passed with the same sources and versions
are not run again, and those that failed come last. Exit status 0: all passed; 1: something failed; 75: run it again.

Without a GPU the first piece is rehearsed by Triton's interpreter, and the others are skipped, as a check of this suite.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # which -P leaves out

from outcomes import append, latest, read, show_errors, show_failures, worst, write

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
AGAIN = 75  # EX_TEMPFAIL
MANY = min(12, max(1, (os.cpu_count() or 1) - 2))  # workers for what waits for compilers
LEAST = 30.0  # seconds worth starting a piece for


@dataclass(frozen=True)
class Piece:
    """A pytest call: test files, worker processes, seconds that it, and that a test of it, may take.

    `alone`: nothing else runs beside it.
    """

    name: str
    files: tuple[str, ...]
    workers: int
    limit: float
    test_limit: float = 90.0
    alone: bool = False


PIECES = (
    Piece("smoke", ("gpu/test_gpu_smoke.py",), MANY, 120, alone=True),
    Piece("models", ("gpu/test_gpu_models.py",), min(4, MANY), 240),
    Piece("frozen", ("gpu/test_gpu_frozen.py",), min(4, MANY), 240),
    Piece("live", ("gpu/test_gpu_live.py", "test_live.py", "test_live_modules.py", "test_plan.py"), min(4, MANY), 240),
    Piece("backward", ("test_backward.py", "test_backward_use.py", "test_train_mode.py", "test_train_networks.py"), MANY, 240),
    Piece("accuracy", ("gpu/test_gpu_accuracy.py",), MANY, 240),
    Piece("runtime", ("gpu/test_gpu_runtime.py",), 1, 240),
    Piece("repeats", ("gpu/test_gpu_repeats.py",), 1, 240),
    Piece(
        "kernels",
        (
            "test_kernels.py", "test_operators.py", "test_compilers.py",
            "test_kernel_models.py", "test_kernel_values.py", "test_kernel_shapes.py",
        ),
        MANY,
        400,
        300,  # 25 random shapes a test
    ),
    Piece("values", ("gpu/test_gpu_values.py",), MANY, 200),
    Piece("writes", ("gpu/test_gpu_writes.py",), MANY, 200),
    Piece("offsets", ("gpu/test_gpu_offsets.py",), 1, 240),
    Piece("compile", ("gpu/test_gpu_compile.py",), 1, 360, 240),
    Piece("export", ("gpu/test_gpu_export.py",), 1, 360, 240),
    Piece("sanitizer", ("gpu/test_gpu_sanitizer.py",), min(6, MANY), 400, 300),
    Piece("commands", ("gpu/test_gpu_commands.py",), 1, 240, 200),
    Piece("processes", ("gpu/test_gpu_processes.py",), 1, 200, 180),
    Piece("bench", ("gpu/test_gpu_bench.py",), 1, 300, 200, alone=True),
    Piece("tune", ("gpu/test_gpu_tune.py",), 1, 300, 280, alone=True),
)  # fmt: skip
# Files that all pieces use.
SHARED = ("conftest.py", "machine.py", "gpu/gpu_cases.py", "gpu/one_of_each.py")


# --- what is tested, and where --------------------------------------------------------------------------------------------

FACTS = """
import json, torch, triton
gpu = torch.cuda.is_available()
name = torch.cuda.get_device_name(0) if gpu else "cpu"
print(json.dumps({"gpu": name, "torch": torch.__version__, "triton": triton.__version__}))
"""


def facts(environment: dict[str, str]) -> dict[str, str]:
    """GPU (or "cpu"), driver and versions; asked for in a process of its own, which does not stay on the GPU."""
    done = subprocess.run([sys.executable, "-c", FACTS], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{sys.executable} cannot import torch and triton:\n{done.stderr[-2000:]}")
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = output_of(query).splitlines() if shutil.which("nvidia-smi") and found["gpu"] != "cpu" else []
    return found | {"driver": driver[0].strip() if driver else "none", "python": platform.python_version()}


def output_of(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """Of this checkout, "-dirty" where it was changed (results apart); a copy without git is told EFFFORMER_COMMIT."""
    if named := os.environ.get("EFFFORMER_COMMIT"):
        return named
    if not shutil.which("git") or not (head := output_of(["git", "rev-parse", "--short=12", "HEAD"])):
        return "unknown"
    changed = output_of(["git", "status", "--porcelain", "--", ".", ":!bench/results"])
    return head + ("-dirty" if changed else "")


def digest(paths: Iterable[Path], *more: str) -> str:
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    found.update("\n".join(more).encode())
    return found.hexdigest()[:16]


def sources() -> list[Path]:
    """The package, but for the benchmarks."""
    folders = ROOT / "effformer", ROOT / "kernels"
    return [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".json")]


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# --- running --------------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """How a piece ended: passed, skipped, failed or unfinished; `earlier`, in another call of this suite."""

    outcome: str
    counts: Counter[str]
    seconds: float
    earlier: bool = False


class Suite:
    """The pieces on this machine: what is known of them, and how to run one."""

    def __init__(self, limit: float, *, rehearse: bool) -> None:
        self.deadline = time.monotonic() + limit
        paths = [str(TESTS / "gpu"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "PYTHONSAFEPATH": "1",  # the folders of this repository must not pass for the installed package
        }
        self.facts = facts(self.environment)
        self.gpu = self.facts["gpu"] != "cpu"
        self.rehearse = rehearse and not self.gpu
        if self.gpu:
            self.environment.pop("TRITON_INTERPRET", None)
        self.pieces = PIECES
        if not self.gpu:
            marked = [dataclasses.replace(piece, test_limit=0.0) for piece in PIECES if piece.name != "kernels"]
            files = tuple(file for piece in marked[1:] for file in piece.files)
            self.pieces = tuple(marked) if rehearse else (marked[0], Piece("the others", files, 1, 120, 0.0))

        self.work = ROOT / "build" / "gpu-suite"
        self.results = ROOT / "bench" / "results" / slug(self.facts["gpu"]) if self.gpu else self.work / "cpu"
        if not self.gpu:
            shutil.rmtree(self.results, ignore_errors=True)
        for folder in (self.results, self.work / "logs", self.work / "cache"):
            folder.mkdir(parents=True, exist_ok=True)
        # Configurations tuned on this machine are for `effformer verify` to prove; here it is the shipped ones.
        self.environment["XDG_CACHE_HOME"] = str(self.work / "cache")
        self.commit, self.sources = commit(), digest(sources())
        # Not by the driver: what passed on one machine need not pass again on the next, with the same GPU in it.
        versions = [f"{name} {version}" for name, version in sorted(self.facts.items()) if name != "driver"]
        self.keys = {
            piece.name: digest({TESTS / name for name in (*SHARED, *piece.files)}, self.sources, *versions)
            for piece in self.pieces
        }
        self.ended: dict[str, Result | None] = {}
        self.runs, self.tests = self.results / "suite.jsonl", self.results / "tests.jsonl"
        # Records of other sources or versions say nothing about these.
        write(self.tests, [record for piece in self.pieces for record in self.records(piece).values()])

    def records(self, piece: Piece) -> dict[str, dict[str, Any]]:
        """The last record of each of a piece's tests."""
        return latest(r for r in read(self.tests) if (r["piece"], r["key"]) == (piece.name, self.keys[piece.name]))

    def result(self, piece: Piece) -> Result | None:
        """How a piece ended with these sources and versions; None if it did not."""
        key = piece.name, self.keys[piece.name]
        ended = [r for r in read(self.runs) if (r["piece"], r["key"]) == key and r["outcome"] != "unfinished"]
        if not ended:
            return None
        counts = Counter({name: ended[-1][name] for name in ("passed", "failed", "skipped")})
        return Result(ended[-1]["outcome"], counts, ended[-1]["seconds"], earlier=True)

    def run_all(self, pieces: Sequence[Piece]) -> None:
        """First what never ended, then what failed in an earlier call."""
        self.ended = {piece.name: self.result(piece) for piece in pieces}
        waiting = [piece for piece in pieces if self.ended[piece.name] is None]
        again = [piece for piece in pieces if (known := self.ended[piece.name]) and known.outcome == "failed"]
        for alone, group in itertools.groupby(waiting, lambda piece: piece.alone):
            together = list(group)
            many = [piece for piece in together if piece.workers > 1]
            one = [piece for piece in together if piece.workers == 1]
            self.side_by_side([together] if alone else [many, one])
        # Over its own limit: once more, as long as there is time.
        while late := [p for p in waiting if (known := self.ended[p.name]) and known.outcome == "unfinished"]:
            if not self.in_turn(late):
                return
        self.in_turn(again, failures=True)

    def side_by_side(self, lanes: Iterable[Sequence[Piece]]) -> None:
        with ThreadPoolExecutor() as pool:
            running = [pool.submit(self.in_turn, lane) for lane in lanes]
            try:
                for lane in running:
                    lane.result()
            except BaseException:
                self.deadline = 0.0  # for the other lane, too
                raise

    def in_turn(self, pieces: Iterable[Piece], *, failures: bool = False) -> bool:
        """Whether there was time to start them all."""
        for piece in pieces:
            if self.deadline - time.monotonic() <= LEAST:
                return False
            print(line(piece.name, self.run(piece, failures=failures)), flush=True)
        return True

    def run(self, piece: Piece, *, failures: bool = False) -> Result:
        """Run what is left of a piece, or, with `failures`, what failed of it; record how it ended."""
        begin = time.monotonic()
        before = self.records(piece)
        done = {name for name, record in before.items() if record["outcome"] != "failed" or not failures}
        status = self.pytest(piece, done, begin + piece.limit)
        counts = Counter(record["outcome"] for record in self.records(piece).values())
        if status is None:
            outcome = "unfinished"
        elif status or counts["failed"]:
            outcome = "failed"
        else:
            outcome = "passed" if counts["passed"] else "skipped" if counts["skipped"] else "failed"
        result = self.ended[piece.name] = Result(outcome, counts, round(time.monotonic() - begin, 1))
        append(
            self.runs,
            {"piece": piece.name, "outcome": outcome}
            | {name: counts[name] for name in ("passed", "failed", "skipped")}
            | {"seconds": result.seconds}
            | self.facts
            | {"commit": self.commit, "sources": self.sources, "key": self.keys[piece.name]}
            | {"date": datetime.now(UTC).isoformat(timespec="seconds")},
        )
        return result

    def pytest(self, piece: Piece, done: set[str], deadline: float) -> int | None:
        """Pytest's exit status, with 0 for nothing left to run; None if the time was up.

        Without pytest-xdist a test that hangs or breaks CUDA takes pytest with it: another one runs what is left.
        """
        stamp = {"piece": piece.name, "key": self.keys[piece.name]}
        done_file, running = self.work / f"{piece.name}.done", self.work / f"{piece.name}.now"
        log = self.work / "logs" / f"{piece.name}.log"
        running.unlink(missing_ok=True)
        environment = self.environment | {
            "EFFFORMER_RECORD": str(self.tests),
            "EFFFORMER_STAMP": json.dumps(stamp),
            "EFFFORMER_DONE": str(done_file),
            "EFFFORMER_NOW": str(running),
            "EFFFORMER_TEST_LIMIT": str(piece.test_limit),
        }
        if self.rehearse or (not self.gpu and piece is self.pieces[0]):
            environment["EFFFORMER_REHEARSE"] = "1"
        command = [sys.executable, "-P", "-m", "pytest", "--tb=short", "--continue-on-collection-errors"]
        command += ["-p", "recorder", "-p", "no:cacheprovider"]
        if self.gpu and importlib.util.find_spec("xdist"):
            command += ["-n", str(piece.workers), "--max-worker-restart", "1000"]
        command += [str((TESTS / name).relative_to(ROOT)) for name in piece.files]
        first, seen = len(read(self.tests)), set[str]()
        with log.open("w", encoding="utf-8") as output:
            while True:
                done_file.write_text("\n".join(sorted(done | seen)), encoding="utf-8")
                status = self.run_group(command, environment, output, deadline)
                if status in (None, 0, 1):
                    return status
                if status == 5 and (done or seen):  # no test was left
                    return 0
                fresh = {r["test"] for r in read(self.tests)[first:] if r["piece"] == piece.name}
                test = running.read_text(encoding="utf-8") if running.exists() else f"pytest for {piece.name}"
                if test not in fresh:
                    text = f"pytest ended with {status}\n{log.read_text(encoding='utf-8')[-2000:]}"
                    append(self.tests, stamp | {"test": test, "outcome": "failed", "seconds": 0.0, "text": text})
                if fresh | {test} == seen:
                    return status
                seen = fresh | {test}

    def run_group(self, command: list[str], environment: dict[str, str], output: Any, deadline: float) -> int | None:
        """Exit status, or None if the time was up; processes that the command started end with it."""
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while time.monotonic() < min(deadline, self.deadline):  # another lane may end all of it
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=0.5)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# --- what came out --------------------------------------------------------------------------------------------------------


def line(name: str, result: Result | None) -> str:
    if result is None:
        return f"{name:<12}not run"
    counts = "".join(f"{result.counts[kind]:>8}" for kind in ("passed", "failed", "skipped"))
    return f"{name:<12}{result.outcome:<12}{counts}{result.seconds:>9.1f} s{'  (earlier)' if result.earlier else ''}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [piece.name for piece in PIECES]
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--limit", type=float, default=530, help="seconds for all of it (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, interpret what can be, tiny (minutes)")
    arguments = parser.parse_args()
    if unknown := set(arguments.pieces) - set(names):
        parser.error(f"unknown pieces {', '.join(sorted(unknown))}, allowed are {', '.join(names)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    suite = Suite(arguments.limit, rehearse=arguments.rehearse)
    print(", ".join(f"{name} {version}" for name, version in suite.facts.items()), f"commit {suite.commit}", flush=True)
    if not suite.gpu:
        print("There is no NVIDIA GPU that torch sees: this checks the suite, not the kernels.", flush=True)
    chosen = [piece for piece in suite.pieces if not arguments.pieces or piece.name in arguments.pieces]

    with contextlib.suppress(KeyboardInterrupt):
        suite.run_all(chosen)

    records = [record for piece in chosen for record in suite.records(piece).values()]
    for record in records:
        for machine in record.get("machine", ()):
            print(f"\n{json.dumps(machine)}")
    show_failures(records)
    found = worst(records)
    write(suite.results / "errors.jsonl", found)
    show_errors(found)
    print(f"\n{'piece':<12}{'outcome':<12}{'passed':>8}{'failed':>8}{'skipped':>8}{'time':>11}")
    for piece in chosen:
        print(line(piece.name, suite.ended[piece.name]))
    outcomes = {result.outcome if result else "not run" for result in suite.ended.values()}
    print(f"\nrecords in {suite.results.relative_to(ROOT)}, logs in {suite.work.relative_to(ROOT)}/logs")
    if outcomes & {"unfinished", "not run"}:
        print("The time is up, and pieces are left: run it again.")
        return AGAIN
    print("Something failed." if "failed" in outcomes else "All passed, or had a reason to be skipped.")
    return int("failed" in outcomes)


if __name__ == "__main__":
    sys.exit(main())
