"""The GPU suite, in pieces: python -P tests/gpu/suite.py [--limit SECONDS] [PIECE ...], or `make gpu`

Pieces run in the order of what they tell, each a pytest call with a time limit of its own. What comes out is written as
it comes, to bench/results/<gpu>/:

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
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
AGAIN = 75  # EX_TEMPFAIL
MANY = min(12, max(1, (os.cpu_count() or 1) - 2))  # workers for what waits for compilers
LEAST = 30.0  # seconds worth starting a piece for


@dataclass(frozen=True)
class Piece:
    """A pytest call: test files, worker processes, seconds that it, and that a test of it, may take."""

    name: str
    files: tuple[str, ...]
    workers: int
    limit: float
    test_limit: float = 90.0


PIECES = (
    Piece("smoke", ("gpu/test_gpu_smoke.py",), MANY, 120),
    Piece("accuracy", ("gpu/test_gpu_accuracy.py",), MANY, 240),
    Piece("repeats", ("gpu/test_gpu_repeats.py",), 1, 240),
    Piece("models", ("gpu/test_gpu_models.py",), min(4, MANY), 240),
    Piece("frozen", ("gpu/test_gpu_frozen.py",), min(4, MANY), 240),
    Piece(
        "kernels",
        ("test_kernels.py", "test_operators.py", "test_kernel_models.py", "test_kernel_values.py", "test_kernel_shapes.py"),
        MANY,
        400,
        300,  # 25 drawn shapes to a test
    ),
    Piece("values", ("gpu/test_gpu_values.py",), MANY, 200),
    Piece("writes", ("gpu/test_gpu_writes.py",), MANY, 200),
    Piece("offsets", ("gpu/test_gpu_offsets.py",), 1, 240),
    Piece("runtime", ("gpu/test_gpu_runtime.py",), 1, 240),
    Piece("compile", ("gpu/test_gpu_compile.py",), 1, 360, 240),
    Piece("export", ("gpu/test_gpu_export.py",), 1, 360, 240),
    Piece("bench", ("gpu/test_gpu_bench.py",), 1, 300, 200),
    Piece("tune", ("gpu/test_gpu_tune.py",), 1, 300, 280),
    Piece("sanitizer", ("gpu/test_gpu_sanitizer.py",), min(6, MANY), 400, 300),
    Piece("commands", ("gpu/test_gpu_commands.py",), 1, 240, 200),
    Piece("processes", ("gpu/test_gpu_processes.py",), 1, 200, 180),
)  # fmt: skip
ODD = ("kernels", "values")  # pieces of small, drawn or spoiled arguments
# What all pieces share.
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
    """Of this checkout, "-dirty" where it was changed (results apart), "unknown" where it is none."""
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


# --- records --------------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a record; one that was cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    partial.replace(path)


def latest(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last record of each test. A worker that dies leaves the reason, and pytest then notes that it died."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        before = found.get(record["test"])
        died = record["outcome"] == "failed" and "crashed while running" in record.get("text", "")
        if not (died and before and before["outcome"] == "failed"):
            found[record["test"]] = record
    return found


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
        self.runs, self.tests = self.results / "suite.jsonl", self.results / "tests.jsonl"
        # What was recorded of other sources or versions says nothing about these.
        write(self.tests, [record for piece in self.pieces for record in self.records(piece).values()])

    def records(self, piece: Piece) -> dict[str, dict[str, Any]]:
        """What is known of a piece's tests."""
        return latest(r for r in read(self.tests) if (r["piece"], r["key"]) == (piece.name, self.keys[piece.name]))

    def result(self, piece: Piece) -> Result | None:
        """How a piece ended with these sources and versions; None if it did not."""
        key = piece.name, self.keys[piece.name]
        ended = [r for r in read(self.runs) if (r["piece"], r["key"]) == key and r["outcome"] != "unfinished"]
        if not ended:
            return None
        counts = Counter({name: ended[-1][name] for name in ("passed", "failed", "skipped")})
        return Result(ended[-1]["outcome"], counts, ended[-1]["seconds"], earlier=True)

    def run(self, piece: Piece, *, failures: bool = False) -> Result:
        """Run what is left of a piece, or, with `failures`, what failed of it; record how it ended."""
        begin = time.monotonic()
        before = self.records(piece)
        done = {name for name, record in before.items() if record["outcome"] != "failed" or not failures}
        status = self.pytest(piece, done, min(begin + piece.limit, self.deadline))
        counts = Counter(record["outcome"] for record in self.records(piece).values())
        if status is None:
            outcome = "unfinished"
        elif status or counts["failed"]:
            outcome = "failed"
        else:
            outcome = "passed" if counts["passed"] else "skipped"
        result = Result(outcome, counts, round(time.monotonic() - begin, 1))
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
                status = run_group(command, environment, output, deadline)
                if status in (None, 0, 1):
                    return status
                if status == 5 and (done or seen):  # no test was left
                    return 0
                fresh = {record["test"] for record in read(self.tests)[first:]}
                test = running.read_text(encoding="utf-8") if running.exists() else f"pytest for {piece.name}"
                if test not in fresh:
                    text = f"pytest ended with {status}\n{log.read_text(encoding='utf-8')[-2000:]}"
                    append(self.tests, stamp | {"test": test, "outcome": "failed", "seconds": 0.0, "text": text})
                if fresh | {test} == seen:
                    return status
                seen = fresh | {test}


def run_group(command: list[str], environment: dict[str, str], output: Any, deadline: float) -> int | None:
    """Exit status, or None if the time was up; whatever the command started ends with it."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
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


def show_failures(records: list[dict[str, Any]], most: int = 6000) -> None:
    """The ends of failures, shorter ones where there are many: those who read the end of the output see them all."""
    failed = [record for record in records if record["outcome"] == "failed"]
    if not failed:
        return
    shown = failed[:40]
    each = max(200, most // len(shown))
    print(f"\n{len(failed)} tests failed:")
    for record in shown:
        text = record.get("text", "").strip()
        if len(text) > each:
            text = f"{text[:60]}\n[...] {text[60 - each :]}"
        print(f"\n{record['piece']}: {record['test']}\n{text}")
    if len(shown) < len(failed):
        print(f"\nand {len(failed) - len(shown)} more")


def worst(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst errors by what was computed and in which dtype; ratios are those of whole, real sizes."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        for note in record.get("errors", ()):
            entry = found.setdefault((note["what"], note["dtype"]), {"tests": 0})
            entry["tests"] += 1
            for name in ("ulps",) if record["piece"] in ODD else ("max", "mean", "ulps"):
                if name in note:
                    entry[name] = max(entry.get(name, 0.0), note[name])
    return [{"what": what, "dtype": dtype} | entry for (what, dtype), entry in sorted(found.items())]


def show_errors(found: list[dict[str, Any]]) -> None:
    if found:
        print("\nworst errors, as multiples of eager's own: largest, mean; and ulp used of the 2 that the rule allows")
    for entry in found:
        ratios = "".join(f"{entry[name]:>8.2f}" if name in entry else "       -" for name in ("max", "mean", "ulps"))
        print(f"{entry['what']:<34}{entry['dtype']:<10}{ratios}   {entry['tests']} tests")


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

    results = {piece.name: suite.result(piece) for piece in chosen}
    # First what never ended, then what failed in an earlier call.
    again = [piece for piece in chosen if (known := results[piece.name]) and known.outcome == "failed"]
    waiting = [piece for piece in chosen if results[piece.name] is None]
    with contextlib.suppress(KeyboardInterrupt):
        while (waiting or again) and suite.deadline - time.monotonic() > LEAST:
            failures = not waiting
            piece = (waiting or again).pop(0)
            result = results[piece.name] = suite.run(piece, failures=failures)
            print(line(piece.name, result), flush=True)
            if result.outcome == "unfinished" and not failures:
                waiting.append(piece)  # it was over its own limit: once more, if there is time after the others

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
        print(line(piece.name, results[piece.name]))
    outcomes = {result.outcome if result else "not run" for result in results.values()}
    print(f"\nrecords in {suite.results.relative_to(ROOT)}, logs in {suite.work.relative_to(ROOT)}/logs")
    if outcomes & {"unfinished", "not run"}:
        print("The time is up, and pieces are left: run it again.")
        return AGAIN
    print("Something failed." if "failed" in outcomes else "All passed, or had a reason to be skipped.")
    return int("failed" in outcomes)


if __name__ == "__main__":
    sys.exit(main())
