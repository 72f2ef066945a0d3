"""Records of what was measured: one JSON object a line, the same for kernels and whole backbones.

They are kept in bench/results/<gpu>/ (`folder`), where the report and the README's table read them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ...config import check_choice

RESULTS = Path("bench/results")

# What is measured, with its unit. "max error" and "mean error" are relative to the largest of the float64 result.
METRICS = (
    "ms",
    "img/s",
    "GB/s",
    "TFLOP/s",
    "p99 ms",
    "peak MiB",
    "max error",
    "mean error",
    "top-1 agreement",
    "compile s",
    "first call s",
    "not run",
)
MODES = ("forward", "backward", "full")
CUT_OFF = "cut off"  # evidence of what is not all that was to be measured together: the time was over


@dataclass(frozen=True)
class Machine:
    """Where and with what something was measured.

    Attributes:
        gpu: its name; for a run on a CPU "cpu: " and the CPU's name.
        driver: of the GPU, "none" without one.
        commit: of the checkout that is the working directory, "-dirty" where it was changed (results apart); the
            package's version outside of one; EFFFORMER_COMMIT in the environment names another.
        date: UTC, ISO 8601.
    """

    gpu: str
    driver: str
    torch: str
    triton: str
    commit: str
    date: str

    @property
    def is_gpu(self) -> bool:
        return not self.gpu.startswith("cpu")


@dataclass(frozen=True)
class Record:
    """One metric of one provider at one shape.

    Attributes:
        op: operation, such as "meta4d", or network, such as "efficientformer_l1".
        provider: who computed: "timm eager", "ours frozen", ...
        mode: of `MODES`.
        dtype: "bfloat16", ...
        shape: of the input, a network's being that of its images.
        metric: of `METRICS`.
        p50: the figure; the median where it was measured several times. NaN with the metric "not run".
        p20, p80: percentiles of what was measured several times.
        roofline: fraction of the floor's speed, 1 being the floor.
        why: with the metric "not run" the reason; else a remark.
        evidence: what shows that the provider's options acted, such as {"kernels": 31, "graph": true}.
        machine: where.
    """

    op: str
    provider: str
    mode: str
    dtype: str
    shape: tuple[int, ...]
    metric: str
    p50: float
    machine: Machine
    p20: float | None = None
    p80: float | None = None
    roofline: float | None = None
    why: str | None = None
    evidence: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("metric", self.metric, METRICS)
        check_choice("mode", self.mode, MODES)

    def as_json(self) -> str:
        """The record's line. NaN is null there, which JSON knows."""
        found = {**dataclasses.asdict(self), **dataclasses.asdict(self.machine)}
        del found["machine"]
        if math.isnan(self.p50):
            found["p50"] = None
        return json.dumps(found, allow_nan=False)


def read_record(line: str, source: str) -> Record:
    """A record from its line.

    Raises:
        ValueError: for a field that is missing, unknown or wrong; it names `source`.
    """
    machine_fields = {field.name for field in dataclasses.fields(Machine)}
    own_fields = {field.name for field in dataclasses.fields(Record)} - {"machine"}
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{source}: no JSON ({error})") from error
    if not isinstance(found, dict) or set(found) != own_fields | machine_fields:
        raise ValueError(f"{source}: got {line[:80]!r}, allowed are exactly the fields of a record")
    machine = Machine(**{name: found.pop(name) for name in machine_fields})
    found["shape"] = tuple(found["shape"])
    found["p50"] = math.nan if found["p50"] is None else found["p50"]
    try:
        return Record(**found, machine=machine)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def read_records(path: Path) -> list[Record]:
    """All records of a file; none if it does not exist. A last line that was cut off is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return [read_record(line, f"{path}, line {number}") for number, line in enumerate(whole.splitlines(), 1)]


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Add records to a file, all of them in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(record.as_json() + "\n" for record in records)
    if path.exists() and not (before := path.read_text(encoding="utf-8")).endswith("\n"):
        path.write_text(before[: before.rfind("\n") + 1], encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def folder(machine: Machine, results: Path = RESULTS) -> Path:
    """Where a machine's records are kept: results/nvidia-h200, or results/cpu."""
    return results / (re.sub(r"[^a-z0-9]+", "-", machine.gpu.lower()).strip("-") if machine.is_gpu else "cpu")


def machine_of(device: torch.device) -> Machine:
    """The machine at hand, measuring on `device`."""
    gpu, driver = _processor(), "none"
    if device.type == "cuda":
        gpu, driver = torch.cuda.get_device_name(device), _driver()
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return Machine(gpu, driver, torch.__version__, triton, _commit(), datetime.now(UTC).isoformat(timespec="seconds"))


@functools.cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names: Iterator[str] = iter(())
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"cpu: {next(names, platform.processor() or platform.machine())}, {torch.get_num_threads()} threads"


@functools.cache
def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = _output(query) if shutil.which("nvidia-smi") else ""
    return found.splitlines()[0].strip() if found else "unknown"


@functools.cache
def _commit() -> str:
    if named := os.environ.get("EFFFORMER_COMMIT"):
        return named
    head = _output(["git", "rev-parse", "--short=12", "HEAD"]) if shutil.which("git") else ""
    if not head:
        return metadata.version("effformer")
    changed = _output(["git", "status", "--porcelain", "--", ".", ":!bench/results"])
    return head + ("-dirty" if changed else "")


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
