"""The runner of the GPU's tests: its records of tests that fail, hang or end their process, and its next call.

Also the package as a plain Python gets it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import plain
import pytest
import torch

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
    monkeypatch.syspath_prepend(folder)
    spec = importlib.util.spec_from_file_location("suite", folder / "suite.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "suite", module)
    spec.loader.exec_module(module)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(TESTS)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # which takes pytest longer than these tests
    monkeypatch.delenv("EFFFORMER_COMMIT", raising=False)
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


MEETS = """
import time
from pathlib import Path

def test_meets():
    Path("{own}").touch()
    begin = time.monotonic()
    while not Path("{other}").exists():
        assert time.monotonic() - begin < 60
        time.sleep(0.1)
    time.sleep(1)
    Path("{own}").unlink()
"""


def pieces(suite: ModuleType, monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    """One for each text: "many" has two processes; "alone" has nothing beside it."""
    for name, text in texts.items():
        (suite.ROOT / "tests" / f"test_{name}.py").write_text(text)
    found = [
        suite.Piece(name, (f"test_{name}.py",), 2 if name == "many" else 1, 100, 90, alone=name == "alone")
        for name in texts
    ]
    monkeypatch.setattr(suite, "PIECES", tuple(found))


def test_pieces_run_side_by_side(
    suite: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of a single process beside one of many, and nothing beside those that measure time."""
    one, many = MEETS.format(own="one", other="many"), MEETS.format(own="many", other="one")
    alone = "from pathlib import Path\ndef test_alone(): assert not Path('one').exists() and not Path('many').exists()"
    pieces(suite, monkeypatch, many=many, one=one, alone=alone)
    assert suite.main() == 0
    runs = [json.loads(line) for line in (suite.ROOT / "bench/results/a-card-1/suite.jsonl").read_text().splitlines()]
    assert [run["piece"] for run in runs][-1] == "alone"
    assert sorted((run["piece"], run["passed"]) for run in runs) == [("alone", 1), ("many", 1), ("one", 1)]
    capsys.readouterr()


def test_an_interrupt_ends_both_lanes(
    suite: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = "import time\nfrom pathlib import Path\ndef test_waits():\n    Path('{}').touch()\n    time.sleep(80)"
    pieces(suite, monkeypatch, many=waits.format("many"), one=waits.format("one"), alone="def test_alone(): pass")

    def interrupt() -> None:
        while not all((suite.ROOT / name).exists() for name in ("many", "one")):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    # A shell starts what runs in the background with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    begin = time.monotonic()
    try:
        assert suite.main() == 75
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begin < 60
    assert outcomes(suite) == {}
    assert "alone       not run" in capsys.readouterr().out


def test_workers_send_what_was_noted(suite: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of classes of their own: torch.__version__ is a kind of str, which pytest-xdist cannot send."""
    pytest.importorskip("xdist")
    monkeypatch.setenv("PYTEST_PLUGINS", "xdist.plugin")
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: True)
    text = (
        "class Version(str): pass\ndef test_it(record_property): record_property('machine', {'torch': Version('2.11')})"
    )
    pieces(suite, monkeypatch, many=text)
    assert suite.main() == 0
    (record,) = suite.read(suite.ROOT / "bench" / "results" / "a-card-1" / "tests.jsonl")
    assert record["machine"] == [{"torch": "2.11"}]


LOSES = """
def pytest_runtest_protocol(item):
    if item.name == "test_lost":
        return True
    if item.name == "test_broken":
        raise RuntimeError("planted")
"""


def test_what_a_worker_loses_has_failed(
    suite: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test that a plugin leaves out without a word, and an internal error: other tests go on, in another process."""
    pytest.importorskip("xdist")
    monkeypatch.setenv("PYTEST_PLUGINS", "xdist.plugin")
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: True)
    names = ("one", "lost", "two", "broken", "three")
    pieces(suite, monkeypatch, many="".join(f"def test_{name}(): pass\n" for name in names))
    (suite.ROOT / "tests" / "conftest.py").write_text(LOSES)
    assert suite.main() == 1
    found = outcomes(suite)
    assert {found.pop("test_lost"), found.pop("test_broken")} == {"failed"}
    assert found == {"test_one": "passed", "test_two": "passed", "test_three": "passed"}
    out = capsys.readouterr().out
    assert "not reported" in out
    assert "RuntimeError: planted" in out
    (suite.ROOT / "tests" / "conftest.py").unlink()
    assert suite.main() == 0
    assert set(outcomes(suite).values()) == {"passed"}


def test_a_copy_without_git_is_told_its_commit(suite: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert suite.commit() == "unknown"
    monkeypatch.setenv("EFFFORMER_COMMIT", "0123456789ab")
    assert suite.commit() == "0123456789ab"


def test_one_of_each_moves_all_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """To another device than the CPU, where they were made; those among the options, too."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "gpu")
    import one_of_each

    monkeypatch.setattr(one_of_each, "DEVICE", torch.device("meta"))
    kinds = set()
    for case in one_of_each.cases(torch.float32):
        moved = one_of_each.moved(case)
        options = [x for x in moved.options.values() if isinstance(x, torch.Tensor)]
        kinds.add(bool(options))
        assert {x.device.type for x in (*moved.arguments, *options)} == {"meta"}, case.operation
    assert kinds == {True, False}


# --- a plain Python -------------------------------------------------------------------------------------------------------


def test_one_line_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, plain.__file__, str(tmp_path / "copy"), "torch", "nonesuch", "yaml", "none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{sys.executable} lacks nonesuch, none\n")
    assert not (tmp_path / "copy").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert plain.lacking(["torch", "gpu", "nonesuch"]) == ["nonesuch", "a GPU that torch sees"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert plain.lacking(["torch", "gpu"]) == []
