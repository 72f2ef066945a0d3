"""The command, from a shell, on the GPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from machine import DEVICE, REHEARSED

pytestmark = pytest.mark.gpu


def effformer(*arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "effformer.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_info() -> None:
    status, out, err = effformer("info")
    assert status == 0, err[-2000:]
    assert f"device {'cpu' if REHEARSED else 'cuda:0'}" in out


def test_verify() -> None:
    """Verify each operation of L1, and the network, in every dtype."""
    small = ("--size", "32x64", "--batch-size", "1", "--op", "pool_mixer") if REHEARSED else ()
    status, out, err = effformer("verify", "--device", DEVICE.type, "--json", *small)
    assert out, err[-2000:]
    found = json.loads(out)
    failed = [check for check in found["checks"] if check["verdict"] == "fail"]
    assert not failed, "\n".join(map(json.dumps, failed))[:2500]
    assert found["interpreted"] == REHEARSED
    assert REHEARSED or not found["counts"]["skipped"], found["counts"]
    assert status == 0, err[-2000:]
