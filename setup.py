"""Make the description that a package index shows, from README.md; pyproject.toml says everything else.

Links into the repository break on an index. Once `[project.urls]` has an entry "Source", they lead there; until then
their text remains, and pictures go. mkdocs_hooks.py treats the documentation's links out of `docs/` in the same way.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
FENCE = r"^```.*?^```$"  # code may look like a link
RELATIVE = r"(?P<picture>!?)\[(?P<text>[^]]*)\]\((?P<target>(?!https?:|mailto:|#)[^)\s]+)\)"


def source_url() -> str | None:
    """The repository's public address, None while it has none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    url: str | None = project["urls"].get("Source")
    return url.rstrip("/") if url else None


def relink(markdown: str, url: str | None, path_of: Callable[[str], str | None]) -> str:
    """Lead relative links to the repository at `url`; without one, keep their text alone.

    `path_of` gives a link's target relative to the repository, or None for a link that stays as it is.
    """

    def replace(match: re.Match[str]) -> str:
        path = path_of(match["target"]) if match["target"] else None
        if path is None:
            return match[0]
        if url is None:
            return "" if match["picture"] else match["text"]
        return f"{match['picture']}[{match['text']}]({url}/{'raw' if match['picture'] else 'blob'}/HEAD/{path})"

    return re.sub(f"{FENCE}|{RELATIVE}", replace, markdown, flags=re.DOTALL | re.MULTILINE)


if __name__ == "__main__":
    setup(
        long_description=relink((ROOT / "README.md").read_text(encoding="utf-8"), source_url(), lambda target: target),
        long_description_content_type="text/markdown",
    )
