"""Checks of the kernels and their outcomes: as data, as lines of a table, as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..accuracy import Accuracy

NETWORK = "network"
VERDICTS = ("pass", "fail", "skipped")


@dataclass(frozen=True)
class Check:
    """One fused operation, or a whole network, on random arguments.

    Attributes:
        operation: a function of `effformer.ops`, or "network".
        shape: of its input: maps [B, C, H, W], tokens [B, N, channels], images [B, 3, H, W].
        dtype: of input and weights.
        options: as in `effformer.workload.Work`; of a network arguments of `create_model`, its "name".
        where: the parts of networks that have this operation at this shape.
    """

    operation: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    options: dict[str, Any] = field(hash=False)
    where: tuple[str, ...]

    @property
    def name(self) -> str:
        """The operation, or the name of the network."""
        return self.options["name"] if self.operation == NETWORK else self.operation

    def __str__(self) -> str:
        return f"{self.name} {describe_shape(self.shape)} {describe_dtype(self.dtype)}"


def describe_shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def describe_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Ran:
    """A kernel that was launched `times` times with this configuration (`Launch.configuration`)."""

    kernel: str
    configuration: dict[str, Any] = field(hash=False)
    times: int

    def __str__(self) -> str:
        words = [f"{self.times} x {self.kernel}" if self.times > 1 else self.kernel]
        for name, value in self.configuration.items():
            short = name.removeprefix("BLOCK_").removeprefix("num_").replace("WIDTHS", "widths")
            if isinstance(value, bool):
                words += [short.lower()] * value
            else:
                words.append(f"{short}={'+'.join(map(str, value)) if isinstance(value, tuple) else value}")
        return " ".join(words)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a check.

    Attributes:
        accuracy: errors of kernels and eager PyTorch; None if the check was skipped, or raised.
        repeated: further runs of the kernels on the same arguments.
        differing: those of them that gave other bits than the first run.
        ran: the kernels that were launched, in the order of their first launch.
        faults: of the kernels' memory accesses, races and waits, where compiled code was executed on a CPU.
        skipped: the reason why no kernel computes this here.
        raised: the error that ended the check.
    """

    check: Check
    accuracy: Accuracy | None = None
    repeated: int = 0
    differing: int = 0
    ran: tuple[Ran, ...] = ()
    faults: tuple[str, ...] = ()
    skipped: str | None = None
    raised: str | None = None

    @property
    def problems(self) -> tuple[str, ...]:
        """The reasons why the check fails; empty where it passes or was skipped."""
        problems = []
        if self.raised:
            problems.append(self.raised)
        if self.accuracy and not self.accuracy.passes():
            problems.append(f"inaccurate: {self.accuracy}")
        if self.accuracy and not self.ran:
            problems.append("no kernel was launched")
        if self.differing:
            problems.append(f"{self.differing} of {self.repeated} more runs gave another result")
        return (*problems, *self.faults)

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        return "skipped" if self.skipped else "fail" if self.problems else "pass"

    @property
    def backend(self) -> str:
        """The backend that computes this here: "triton", or "eager" because of `skipped`."""
        return "eager" if self.skipped else "triton"

    @property
    def ratios(self) -> tuple[float | None, float | None]:
        """Largest and mean error divided by eager's; None without errors, or where eager's is 0."""
        if (found := self.accuracy) is None:
            return None, None
        largest, mean = found.eager_max_error, found.eager_mean_error
        return found.max_error / largest if largest else None, found.mean_error / mean if mean else None

    def facts(self) -> dict[str, Any]:
        """The outcome as JSON holds it; every key is always there."""
        facts, (ratio, mean_ratio) = asdict(self), self.ratios
        check, errors = facts.pop("check"), facts.pop("accuracy") or dict.fromkeys(Accuracy.__dataclass_fields__)
        judged = {"backend": self.backend, "verdict": self.verdict, "problems": self.problems}
        return check | judged | facts | errors | {"ratio": ratio, "mean_ratio": mean_ratio}


# --- as text ----------------------------------------------------------------------------------------------------------


class Columns:
    """Lines for outcomes, in columns wide enough for all of `checks`."""

    def __init__(self, checks: Sequence[Check]) -> None:
        name = max(len(check.name) for check in checks)
        shape = max(len(describe_shape(check.shape)) for check in checks)
        widths = f"<{name}", f"<{shape}", "<8", ">8", ">8", ">5", ">5", ">7", "<7", "<7", ""
        self._line = "  ".join(f"{{:{width}}}" for width in widths).format

    def head(self) -> str:
        """The names of the columns: largest error, eager's, their ratio, the ratio of the mean errors, ..."""
        return self._line(
            "operation", "shape", "dtype", "error", "eager's", "ratio", "mean", "ulp", "verdict", "backend", "kernels"
        )

    def line(self, outcome: Outcome) -> str:
        """One outcome; "-" stands for a missing error, and for a ratio to an error of 0."""
        check, found = outcome.check, outcome.accuracy
        errors = ["-"] * 5
        if found is not None:
            ratios = ["-" if ratio is None else f"{ratio:.2f}" for ratio in outcome.ratios]
            errors = [f"{found.max_error:.2e}", f"{found.eager_max_error:.2e}", *ratios, f"{found.ulp:.1e}"]
        launches = sum(ran.times for ran in outcome.ran)
        kernels = "; ".join(map(str, outcome.ran)) if launches < 9 else f"{launches} launches, see --json"
        verdict = "FAIL" if outcome.verdict == "fail" else outcome.verdict
        shape, dtype = describe_shape(check.shape), describe_dtype(check.dtype)
        return self._line(check.name, shape, dtype, *errors, verdict, outcome.backend, kernels)


def conclusion(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each failure, and a last one with the counts."""
    lines = [f"FAIL {outcome.check}: {problem}" for outcome in outcomes for problem in outcome.problems]
    counts = Counter(outcome.verdict for outcome in outcomes)
    skipped = Counter(outcome.skipped for outcome in outcomes if outcome.skipped)
    if ran := counts["pass"] + counts["fail"]:
        others = "".join(f"; {number} not run: {reason}" for reason, number in skipped.items())
        return [*lines, f"{counts['pass']} of {ran} pass{others}"]
    return [f"no kernel was verified: {'; '.join(map(str, skipped))}"]
