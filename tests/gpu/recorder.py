"""A pytest plugin for suite.py (`-p recorder`): outcomes as they come, and an end to tests that hang or break CUDA.

A kernel that reads outside its memory breaks CUDA for the whole process, and every later test would fail, too. So
that process ends at once; pytest-xdist starts another one, and goes on with the next test.

Environment, all optional:
    EFFFORMER_RECORD      file that gets a line of JSON for each test
    EFFFORMER_STAMP       JSON, fields of every such line
    EFFFORMER_DONE        file of test ids, one a line, not to run again
    EFFFORMER_NOW         file for the id of the test that runs (without pytest-xdist, which knows it)
    EFFFORMER_TEST_LIMIT  seconds that a test may take
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

BROKEN = 70  # exit status of a process that gave up
_MOST_TEXT = 3000  # characters of a failure
_stderr = os.fdopen(os.dup(2), "w")  # before pytest captures it


def write(record: dict[str, Any]) -> None:
    """Append a line to the record, in one piece: workers write, too, before they give up."""
    if file := os.environ.get("EFFFORMER_RECORD"):
        line = json.dumps(json.loads(os.environ.get("EFFFORMER_STAMP", "{}")) | record) + "\n"
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(descriptor, line.encode())
        os.close(descriptor)


def give_up(nodeid: str, text: str) -> None:
    """Record that the running test failed, and end this process."""
    write({"test": nodeid, "outcome": "failed", "seconds": 0.0, "text": text[-_MOST_TEXT:]})
    print(f"\n{nodeid}\n{text}", file=_stderr, flush=True)
    os._exit(BROKEN)


def _text(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longreprtext
    return text if len(text) <= _MOST_TEXT else "[...]\n" + text[-_MOST_TEXT:]


class Recorder:
    """Where tests are reported: in the process that pytest was called as, not in its workers."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        self.collected: set[str] = set()  # by workers; one that takes the place of another collects all tests again
        self.reported: set[str] = set()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.collected.update(ids)

    def pytest_sessionfinish(self) -> None:
        """Pytest-xdist passes without tests that a worker skipped over."""
        for nodeid in sorted(self.collected - self.reported):
            write({"test": nodeid, "outcome": "failed", "seconds": 0.0, "text": "not reported: see the piece's log"})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Up to three times for a test: set up, called, torn down; once, at any time, when its process dies."""
        record = self.found.setdefault(report.nodeid, {"test": report.nodeid, "outcome": "passed", "seconds": 0.0})
        record["seconds"] = round(record["seconds"] + report.duration, 2)
        if report.failed and record["outcome"] != "failed":
            record |= {"outcome": "failed", "text": _text(report)}
        elif report.skipped and record["outcome"] == "passed":
            text = (
                report.longrepr[2]
                if isinstance(report.longrepr, tuple)
                else getattr(report, "wasxfail", str(report.longrepr))
            )
            record |= {"outcome": "skipped", "text": text}
        if report.when not in ("setup", "call"):
            for name, value in report.user_properties:
                record.setdefault(name, []).append(value)
            self.reported.add(report.nodeid)
            write(self.found.pop(report.nodeid))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            write({"test": report.nodeid, "outcome": "failed", "seconds": 0.0, "text": _text(report)})


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that have run."""
    if file := os.environ.get("EFFFORMER_DONE"):
        done = set(Path(file).read_text(encoding="utf-8").splitlines())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """A test over its time ends its process: nothing gentler stops a kernel that never returns."""
    if (file := os.environ.get("EFFFORMER_NOW")) and not hasattr(item.config, "workerinput"):
        Path(file).write_text(item.nodeid, encoding="utf-8")
    limit = float(os.environ.get("EFFFORMER_TEST_LIMIT", "0"))
    if not limit:
        return (yield)
    main = threading.get_ident()

    def stop() -> None:
        stack = "".join(traceback.format_stack(sys._current_frames()[main])[-4:])
        give_up(item.nodeid, f"over its limit of {limit:.0f} s, in\n{stack}")

    timer = threading.Timer(limit, stop)
    timer.daemon = True
    timer.start()
    # Where the main thread keeps the interpreter to itself, the timer cannot run.
    faulthandler.dump_traceback_later(limit + 15, exit=True, file=_stderr)
    try:
        return (yield)
    except Exception:  # of pytest or a plugin: pytest-xdist would lose the test, or end with all that are left
        give_up(item.nodeid, traceback.format_exc())
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    # Workers send plain values alone: a version of torch, say, is of a class that pytest-xdist cannot send.
    report.user_properties = json.loads(json.dumps(report.user_properties, default=str))
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            give_up(item.nodeid, f"{report.longreprtext}\nCUDA is broken: {error}")
    return report
