"""Processes that compile kernels, beside one that interprets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="a C compiler builds the stub driver")


def start(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python without TRITON_INTERPRET and without a GPU; modules of the tests can be imported."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= variables | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def run(*arguments: str, **variables: str) -> str:
    """The output of a process that must succeed."""
    done = start(*arguments, **variables)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout
