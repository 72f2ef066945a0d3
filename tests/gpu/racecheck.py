"""Reads the hazards that compute-sanitizer's racecheck reports, and tells the known false ones from others.

In Triton's reductions across warps several threads hold one result, equal but for rounding, and write it to one place
(github.com/triton-lang/triton/issues/7264): a "WAW hazard" whose accesses all lie in the line of a reduction.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

_HAZARD = re.compile(r"Potential (\w+) hazard")
_PLACE = re.compile(r"\b(?:Write|Read) Thread .* in (\S+?):(\d+)")
_REDUCTION = re.compile(r"\btl\.(?:sum|max|min|reduce|argmax|argmin)\(")


def split(lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """Reports of hazards, each in one line: (known false ones, others)."""
    known, others = [], []
    for report in _reports(lines):
        kind, places = _HAZARD.search(report[0]), [m for line in report for m in _PLACE.finditer(line)]
        false = kind is not None and kind[1] == "WAW" and bool(places) and all(_reduces(*m.groups()) for m in places)
        (known if false else others).append(" ".join(line.strip("= ") for line in report))
    return known, others


def _reports(lines: Sequence[str]) -> Iterator[list[str]]:
    report: list[str] = []
    for line in lines:
        if _HAZARD.search(line) or "SUMMARY" in line:
            if report:
                yield report
            report = []
        if _HAZARD.search(line) or report:
            report.append(line)
    if report:
        yield report


def _reduces(file: str, line: str) -> bool:
    """Whether that line of code is a reduction, or of Triton's own functions for them."""
    if file.endswith("triton/language/standard.py"):
        return True
    try:
        return bool(_REDUCTION.search(Path(file).read_text(encoding="utf-8").splitlines()[int(line) - 1]))
    except (OSError, IndexError):
        return False
