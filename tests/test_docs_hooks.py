"""What `make docs` does with pages and docstrings before they are shown."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("griffe", reason="the extra 'docs' is not installed")

hooks = runpy.run_path(str(Path(__file__).parent.parent / "mkdocs_hooks.py"))


@pytest.mark.parametrize(
    ("page", "markdown", "without", "with_url"),
    [
        ("a.md", "[b](../tests/b.txt)", "b", "[b](https://host/x/blob/HEAD/tests/b.txt)"),
        ("api/a.md", "[b](../../README.md)", "b", "[b](https://host/x/blob/HEAD/README.md)"),
        ("api/a.md", "[b](../c.md#d)", "[b](../c.md#d)", "[b](../c.md#d)"),
        ("a.md", "![b](c.svg) [d](https://e)", "![b](c.svg) [d](https://e)", "![b](c.svg) [d](https://e)"),
    ],
)
def test_links_out_of_the_pages(page: str, markdown: str, without: str, with_url: str) -> None:
    for url, expected in ((None, without), ("https://host/x", with_url)):
        place = SimpleNamespace(file=SimpleNamespace(src_uri=page))
        assert hooks["on_page_markdown"](markdown, place, SimpleNamespace(repo_url=url)) == expected


def test_arguments_that_share_an_entry_get_one_each() -> None:
    docstring = """Scale.

    a, b: not an argument.

Args:
    x: a map, [B, C].
    scale, shift: [C],
        float32.
    *rest: more.

Raises:
    TypeError, ValueError: as ever."""
    before, after = "    scale, shift: [C],\n        float32.\n", "{}: [C],\n        float32.\n"
    assert before in docstring
    expected = docstring.replace(before, f"    scale{after.format('')}    shift{after.format('')}")
    assert hooks["one_entry_each"](docstring) == expected
    assert hooks["one_entry_each"]("No arguments.") == "No arguments."
