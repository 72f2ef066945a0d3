"""Processes that start at once with an empty kernel cache: all of them write to the same folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from machine import REHEARSED

pytestmark = pytest.mark.gpu
SCRIPT = Path(__file__).with_name("one_of_each.py")


def test_cold_processes(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-P", str(SCRIPT), "float16"]
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2 if REHEARSED else 8)
    ]
    outputs = []
    for process in started:
        out, err = process.communicate()
        assert process.returncode == 0, (out + err)[-3000:]
        outputs.append(out)
    assert len(outputs[0].splitlines()) > 5
    assert set(outputs) == {outputs[0]}
