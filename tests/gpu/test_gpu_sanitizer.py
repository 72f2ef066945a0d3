"""Each kernel under NVIDIA's compute-sanitizer: accesses out of bounds, races in shared memory, uninitialised reads.

Hazards that racecheck is known to report falsely (racecheck.py) are a warning of the test, and do not fail it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from racecheck import split

pytestmark = [pytest.mark.gpu, pytest.mark.cuda]
SCRIPT = Path(__file__).with_name("one_of_each.py")
TOOLS = ["memcheck", "racecheck", "synccheck", "initcheck"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("tool", TOOLS)
def test_sanitizer(tool: str, dtype: str, record_property: Callable[[str, object], None]) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer on PATH")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "86", "--print-limit", "10"]
    if tool == "racecheck":
        command += ["--racecheck-report", "hazard"]
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]  # PyTorch and Triton ask the driver for functions it may not have
    command += [sys.executable, "-P", str(SCRIPT), dtype]
    # Each tensor in an allocation of its own: PyTorch's pool would hide where one ends.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if unsupported := re.search(r"^.*(?:Device not supported|not supported on this).*$", output, re.MULTILINE):
        pytest.skip(unsupported[0].strip("= \n"))
    lines = [line for line in output.splitlines() if line.startswith("=========")]
    if tool == "racecheck":
        known, others = split(lines)
        assert not others, "\n".join(others[:20])
        if known:
            record_property("racecheck", known)
            warnings.warn(f"{len(known)} hazards in reductions, which Triton knows: {known[0]}", stacklevel=1)
            return
    assert done.returncode == 0, "\n".join([*lines[:60], output[-1500:]])
    summaries = [line for line in lines if "SUMMARY" in line]
    assert summaries, output[-3000:]
    for line in summaries:
        assert re.search(r"SUMMARY: 0 (?:errors|hazards)", line), "\n".join(lines[:60])
