"""Checks that a tag, the package, CHANGELOG.md and CITATION.cff name the same version.

    python tests/release_version.py v1.2.3

Without a tag, only the files are compared; the changelog may then have no entry yet. It needs nothing but Python.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def disagreements(root: Path, tag: str | None = None) -> list[str]:
    """A line for each place that does not name the package's version."""

    def search(name: str, pattern: str) -> str | None:
        found = re.search(pattern, (root / name).read_text(encoding="utf-8"), re.MULTILINE)
        return found and found[1]

    version = search("effformer/version.py", r'^__version__ = "(.+)"$')
    # Unreleased changes stand above the latest release.
    released = search("CHANGELOG.md", r"^## \[(\d[^]]*)\] - \d{4}-\d{2}-\d{2}$")
    found = {"CITATION.cff": search("CITATION.cff", r"^version: (.+)$")}
    if tag is not None:
        found |= {"the tag": tag.removeprefix("v"), "the latest release in CHANGELOG.md": released}
    return [f"{place}: got {name}, allowed is {version}" for place, name in found.items() if name != version]


if __name__ == "__main__":
    sys.exit("\n".join(disagreements(ROOT, *sys.argv[1:])) or 0)
