"""The runner of the GPU's tests: what it records of tests that fail, hang or take their process along, and what it does
when it is called again."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

TESTS = """
import os, time

def test_good(record_property):
    record_property("errors", {"what": "an operation", "dtype": "float16", "max": 1.5, "mean": 1.0, "ulps": 0.25})

def test_bad():
    assert os.path.exists("repaired"), "nobody repaired it"

def test_dies():
    if not os.path.exists("repaired"):
        os.abort()

def test_hangs():
    time.sleep(0 if os.path.exists("repaired") else 60)

def test_last():
    pass
"""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The runner, on a folder that holds the tests above, as if there were a GPU; without pytest-xdist."""
    folder = Path(__file__).parent / "gpu"
    spec = importlib.util.spec_from_file_location("suite", folder / "suite.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "suite", module)
    spec.loader.exec_module(module)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(TESTS)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "TESTS", tmp_path / "tests")
    monkeypatch.setattr(module, "SHARED", ())
    monkeypatch.setattr(module, "PIECES", (module.Piece("it", ("test_it.py",), 1, 100, 4),))
    monkeypatch.setattr(module, "facts", lambda environment: {"gpu": "A Card 1", "torch": "2"})
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["suite.py"])
    return module


def outcomes(suite: ModuleType) -> dict[str, str]:
    records = suite.latest(suite.read(suite.ROOT / "bench" / "results" / "a-card-1" / "tests.jsonl"))
    return {name.rpartition("::")[2]: record["outcome"] for name, record in records.items()}


def test_a_suite_goes_on(suite: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main() == 1
    out = capsys.readouterr().out
    assert outcomes(suite) == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_dies": "failed",
        "test_hangs": "failed",
        "test_last": "passed",
    }
    for part in (
        "nobody repaired it",
        "pytest ended with -6",
        "over its limit of 4 s",
        "time.sleep",
        "Something failed",
    ):
        assert part in out
    assert "an operation                      float16       1.50    1.00    0.25   1 tests" in out
    record = json.loads((suite.ROOT / "bench" / "results" / "a-card-1" / "suite.jsonl").read_text())
    assert (record["piece"], record["outcome"], record["commit"]) == ("it", "failed", "unknown")
    assert (record["passed"], record["failed"], record["skipped"]) == (2, 3, 0)

    (suite.ROOT / "repaired").touch()  # flaky, so to say: no source has changed
    assert suite.main() == 0
    assert set(outcomes(suite).values()) == {"passed"}
    log = (suite.ROOT / "build" / "gpu-suite" / "logs" / "it.log").read_text()
    assert "3 passed, 2 deselected" in log

    assert suite.main() == 0
    assert "(earlier)" in capsys.readouterr().out.splitlines()[-4]

    (suite.ROOT / "tests" / "test_it.py").write_text("def test_new(): pass")
    assert suite.main() == 0
    assert outcomes(suite) == {"test_new": "passed"}


def test_a_suite_whose_time_is_up(
    suite: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (suite.ROOT / "tests" / "test_it.py").write_text(
        "import time\ndef test_one(): pass\ndef test_two(): time.sleep(99)"
    )
    monkeypatch.setattr(suite, "PIECES", (suite.Piece("it", ("test_it.py",), 1, 100, 90),))
    monkeypatch.setattr(suite, "LEAST", 0.1)
    monkeypatch.setattr(sys, "argv", ["suite.py", "--limit", "10"])
    assert suite.main() == 75
    assert capsys.readouterr().out.endswith("The time is up, and pieces are left: run it again.\n")
    assert outcomes(suite)["test_one"] == "passed"
