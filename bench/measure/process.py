"""A provider of a network in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

import torch

from ...kernels.tiling.choose import user_file
from .network_providers import Measurement, NetworkProvider
from .network_run import Figures
from .resume import FailedError

LIMIT = 400.0  # seconds that a provider may take
Part = Literal["all", "speed", "compile"]  # all figures, speed alone, or compiling into the cache that providers share


def in_process(
    provider: NetworkProvider,
    measurement: Measurement,
    part: Part,
    *,
    device: torch.device,
    seconds: float = LIMIT,
) -> Figures:
    """Measure a provider, or compile it alone, in a process of its own.

    After `seconds` that ends, with all that it started.

    Raises:
        TimeoutError: after `seconds`.
        FailedError: with the last line that the process wrote, if it fails.
    """
    job = {"provider": provider.name, "measurement": measurement, "device": str(device), "part": part,
           "parent": os.getpid()}  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(user_file().with_name("inductor")))  # kept between runs
    with tempfile.TemporaryDirectory() as scratch:
        target, log = Path(scratch, "figures.json"), Path(scratch, "log")
        command = [sys.executable, "-P", "-m", f"{__package__}.network_run", json.dumps(job), str(target)]
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                raise TimeoutError from None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # Inductor's workers, too
                process.wait()
        if status != 0 or not target.exists():
            raise FailedError(_reason(log.read_text(encoding="utf-8", errors="replace"), status))
        return Figures(**json.loads(target.read_text(encoding="utf-8")))


def _reason(log: str, status: int) -> str:
    """The exception's own line of a traceback, else the last one."""
    lines = [line for line in log.splitlines() if line.strip()]
    raised = [line for line in lines if line[:1].isalpha() and "Error" in line.partition(":")[0]]
    return (raised or lines or [f"its process ended with status {status}"])[-1].strip()[:300]
