"""Records of suite.py as lines of JSON, and what it shows of them at its end: failures, and the worst errors."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ODD = ("kernels", "values")  # pieces of random shapes, or with NaN and infinities


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a record; one that was cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    partial.replace(path)


def latest(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last record of each test. A worker that dies leaves the reason, and pytest then notes that it died."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        before = found.get(record["test"])
        died = record["outcome"] == "failed" and "crashed while running" in record.get("text", "")
        if not (died and before and before["outcome"] == "failed"):
            found[record["test"]] = record
    return found


def show_failures(records: list[dict[str, Any]], most: int = 6000) -> None:
    """The ends of failures, shorter ones where there are many: those who read the end of the output see them all."""
    failed = [record for record in records if record["outcome"] == "failed"]
    if not failed:
        return
    shown = failed[:40]
    each = max(200, most // len(shown))
    print(f"\n{len(failed)} tests failed:")
    for record in shown:
        text = record.get("text", "").strip()
        if len(text) > each:
            text = f"{text[:60]}\n[...] {text[60 - each :]}"
        print(f"\n{record['piece']}: {record['test']}\n{text}")
    if len(shown) < len(failed):
        print(f"\nand {len(failed) - len(shown)} more")


def worst(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst errors by what was computed and in which dtype; ratios are those of whole, real sizes."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        for note in record.get("errors", ()):
            entry = found.setdefault((note["what"], note["dtype"]), {"tests": 0})
            entry["tests"] += 1
            for name in ("ulps",) if record["piece"] in ODD else ("max", "mean", "ulps"):
                if name in note:
                    entry[name] = max(entry.get(name, 0.0), note[name])
    return [{"what": what, "dtype": dtype} | entry for (what, dtype), entry in sorted(found.items())]


def show_errors(found: list[dict[str, Any]]) -> None:
    if found:
        print("\nworst errors, as multiples of eager's own: largest, mean; and ulp used of the 2 that the rule allows")
    for entry in found:
        ratios = "".join(f"{entry[name]:>8.2f}" if name in entry else "       -" for name in ("max", "mean", "ulps"))
        print(f"{entry['what']:<34}{entry['dtype']:<10}{ratios}   {entry['tests']} tests")
