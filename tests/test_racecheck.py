"""Hazards of compute-sanitizer: those that Triton's reductions are known for are told from others."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
HEAD = ROOT / "kernels" / "head.py"


@pytest.fixture(scope="module")
def racecheck() -> ModuleType:
    spec = importlib.util.spec_from_file_location("racecheck", ROOT / "tests" / "gpu" / "racecheck.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def line_of(text: str) -> int:
    """The number of the only line of head.py with this text."""
    (found,) = (number for number, line in enumerate(HEAD.read_text().splitlines(), 1) if text in line)
    return found


def report(kind: str, first: tuple[Path | str, int], second: tuple[Path | str, int]) -> list[str]:
    verb = "Read" if kind == "RAW" else "Write"
    return [
        f"========= Error: Potential {kind} hazard detected at __shared__ 0x40 in block (0,0,0) :",
        f"=========     Write Thread (0,0,0) at head_kernel+0x1b0 in {first[0]}:{first[1]}",
        f"=========     {verb} Thread (32,0,0) at head_kernel+0x1b0 in {second[0]}:{second[1]}",
        "=========     Current Value : 1, Incoming Value : 1",
    ]


def test_reductions_are_known_and_nothing_else(racecheck: ModuleType) -> None:
    sums, loads = line_of("b_sum += tl.sum("), line_of("b_x = tl.load(")
    standard = "/usr/lib/python3/site-packages/triton/language/standard.py"
    known = [report("WAW", (HEAD, sums), (HEAD, sums)), report("WAW", (standard, 263), (HEAD, sums))]
    others = [
        report("RAW", (HEAD, sums), (HEAD, sums)),
        report("WAW", (HEAD, sums), (HEAD, loads)),
        report("WAW", ("/no/such/file.py", 3), (HEAD, sums)),
        report("WAW", (HEAD, 10**6), (HEAD, sums)),
        ["========= Error: Potential WAW hazard detected at __shared__ 0x40 in block (0,0,0) :"],
    ]
    lines = [
        "========= COMPUTE-SANITIZER",
        *itertools.chain(*known, *others),
        "========= RACECHECK SUMMARY: 7 hazards displayed",
    ]
    found = racecheck.split(lines)
    assert [len(part) for part in found] == [2, 5]
    assert all("SUMMARY" not in one and "hazard detected" in one for part in found for one in part)
    assert racecheck.split(["========= COMPUTE-SANITIZER", "========= RACECHECK SUMMARY: 0 hazards"]) == ([], [])
