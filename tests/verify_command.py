"""Calls `effformer verify` in this process."""

from __future__ import annotations

import json
from typing import Any

import pytest

from effformer.cli import main

SMALL = ("--device", "cpu", "--size", "32x64", "--batch-size", "1", "--dtype", "float16")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["verify", *arguments])
    return status, capsys.readouterr().out


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status, out = run(capsys, "--json", *arguments)
    return status, json.loads(out)
