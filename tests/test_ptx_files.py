"""The hand-written kernels are PTX: NVIDIA's assembler takes each of them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import triton
from ptx_runs import FILES

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@pytest.mark.parametrize("file", sorted(FILES.glob("*.ptx")), ids=lambda file: file.stem)
def test_it_assembles(file: Path, tmp_path: Path) -> None:
    target = re.search(r"^\.target (\w+)", file.read_text(), re.MULTILINE)
    assert target
    newer = TOOLS / "ptxas-blackwell"
    tool = newer if newer.exists() else TOOLS / "ptxas"
    command = [tool, f"--gpu-name={target[1]}", file, "-o", tmp_path / "cubin"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
