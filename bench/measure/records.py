"""Records of measurements: one JSON object a line, the same for operations and networks.

They are kept in bench/results/<gpu>/ (`folder`), where the report and the README's table read them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ...checks import check_choice
from ...files import append_lines
from ...kernels.tiling.choose import KERNELS, digest_of, user_file
from ...version import __version__

RESULTS = Path("bench/results")
_PACKAGE = Path(sys.modules[__package__.partition(".")[0]].__path__[0])
CODE = (_PACKAGE, KERNELS, Path(__file__).parents[1])  # the package, the kernels with their table, the benchmarks
Key = tuple[str, str, str, tuple[int, ...], str]

# Each with its unit. "max error" and "mean error" are relative to the largest value of the float64 result. Two have no
# figure: "begun" says that a provider was started, "not run" that it gave no result.
SPEEDS = ("ms", "p99 ms", "img/s", "GB/s", "TFLOP/s")
ERRORS = ("max error", "mean error", "top-1 agreement")
METRICS = (*SPEEDS, *ERRORS, "peak MiB", "compile s", "first call s", "begun", "not run")


@dataclass(frozen=True)
class Machine:
    """The machine, the versions and the code that figures are of.

    Attributes:
        gpu: its name; for a run on a CPU "cpu: " and the CPU's name.
        driver: of the GPU, "none" without one.
        torch, triton, timm: versions, "none" for one that is not installed.
        sources: a digest of the code, see `sources`.
        commit: of the checkout that is the working directory, "-dirty" where it was changed (results apart); the
            package's version outside of one; EFFFORMER_COMMIT in the environment names another.
        date: UTC, ISO 8601.
    """

    gpu: str
    driver: str
    torch: str
    triton: str
    timm: str
    sources: str
    commit: str
    date: str

    @property
    def is_gpu(self) -> bool:
        return not self.gpu.startswith("cpu")

    @property
    def setup(self) -> Machine:
        """The same without date and commit, which committing results changes. Figures of one setup are comparable."""
        return dataclasses.replace(self, commit="", date="")


@dataclass(frozen=True)
class Record:
    """One metric of one provider at one shape.

    Attributes:
        op: operation, such as "meta4d", or network, such as "efficientformer_l1".
        provider: such as "timm eager" or "ours frozen".
        mode: "forward", the only one so far.
        dtype: "bfloat16", ...
        shape: of the input, a network's being that of its images.
        metric: of `METRICS`.
        p50: the figure, or the median of several; NaN with the metrics "begun" and "not run".
        p20, p80: percentiles of several figures.
        roofline: the speed as a fraction of the roofline's, which is 1.
        why: the reason with the metric "not run", else a remark.
        details: of the run, such as {"kernels": 31, "graph": true}. "options" are an operation's own beside its shape,
            "failed" is a list of errors.
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
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("metric", self.metric, METRICS)

    @property
    def key(self) -> Key:
        """The measurement that the record belongs to."""
        return key_of(self.op, self.dtype, self.shape, self.details.get("options", {}), self.mode)

    def as_json(self) -> str:
        """The record's line, in which NaN is null."""
        found = {**dataclasses.asdict(self), **dataclasses.asdict(self.machine)}
        del found["machine"]
        if math.isnan(self.p50):
            found["p50"] = None
        return json.dumps(found, allow_nan=False)


def key_of(
    op: str, dtype: str, shape: tuple[int, ...], options: Mapping[str, Any] | None = None, mode: str = "forward"
) -> Key:
    """The key of a measurement; its records differ in provider and metric. Options become JSON."""
    return op, mode, dtype, shape, json.dumps(dict(options or {}), sort_keys=True)


def read_records(path: Path) -> list[Record]:
    """All records of a file, none if it does not exist. An incomplete last line is left out.

    Raises:
        ValueError: for a line with a field that is missing, unknown or wrong; it names the line.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    records = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            found = json.loads(line)
            machine = Machine(**{field.name: found.pop(field.name) for field in dataclasses.fields(Machine)})
            p50 = math.nan if found["p50"] is None else found["p50"]
            records.append(Record(**found | {"shape": tuple(found["shape"]), "p50": p50}, machine=machine))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: got {line[:80]!r}, which is not a record ({error})") from error
    return records


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Add records to a file, all or none, after removing an incomplete last line.

    Raises:
        OSError: naming the file, where it cannot be written.
    """
    append_lines(path, (record.as_json() for record in records))


def folder(machine: Machine, results: Path = RESULTS) -> Path:
    """The folder of a machine's records: results/nvidia-h200, or results/cpu."""
    return results / (re.sub(r"[^a-z0-9]+", "-", machine.gpu.lower()).strip("-") if machine.is_gpu else "cpu")


def machine_of(device: torch.device) -> Machine:
    """The machine at hand, measuring on `device`."""
    gpu, driver = _processor(), "none"
    if device.type == "cuda":
        gpu, driver = torch.cuda.get_device_name(device), _driver()
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return Machine(gpu, driver, torch.__version__, _version("triton"), _version("timm"), sources(), _commit(), date)


@functools.cache
def sources(*folders: Path) -> str:
    """A digest of the code in `folders` (default: `CODE`), and of the tiles that were tuned on this machine."""
    tuned = user_file().read_bytes() if user_file().is_file() else b""
    parts = (digest_of(folder, "*.py", "*.json").encode() for folder in folders or CODE)
    return hashlib.sha256(b"".join(parts) + tuned).hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


@functools.cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:(.*)", info.read_text(errors="replace"), re.MULTILINE) if info.exists() else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"cpu: {name}, {torch.get_num_threads()} threads"


@functools.cache
def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _output(query).partition("\n")[0].strip() or "unknown"


@functools.cache
def _commit() -> str:
    if named := os.environ.get("EFFFORMER_COMMIT"):
        return named
    head = _output(["git", "rev-parse", "--short=12", "HEAD"])
    if not head:
        return __version__
    changed = _output(["git", "status", "--porcelain", "--", ".", ":!bench/results"])
    return head + ("-dirty" if changed else "")


def _output(command: list[str]) -> str:
    """The output of a command; nothing where it fails or is not installed."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
