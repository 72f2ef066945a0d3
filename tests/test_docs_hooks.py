"""`make docs` prepares pages and docstrings before it shows them."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("griffe", reason="the extra 'docs' is not installed")

ROOT = Path(__file__).parent.parent
hooks = runpy.run_path(str(ROOT / "mkdocs_hooks.py"))


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


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "api").glob("*.md")), ids=lambda page: page.stem)
def test_the_tables_of_the_api_are_those_of_the_docstrings(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert hooks["with_names"](text) == text, "run .venv/bin/python mkdocs_hooks.py"


def test_a_table_names_functions_modules_members_and_reexports() -> None:
    bare = "# A\n\n::: effformer.export\n\n::: effformer.detectron2\n"
    text = hooks["with_names"](bare)
    names = [line.split("`")[1] for line in text.splitlines() if line.startswith("| [")]
    assert names == ["export", "detectron2", "detectron2.EfficientFormerBackbone"]  # ShapeSpec is not documented
    assert "| [`export`](../../effformer/serving/export.py) | Write `model` to a file, load it again, and" in text
    assert text.endswith(bare.removeprefix("# A\n"))
    assert hooks["with_names"](text) == text


def test_the_site_is_not_built_with_an_old_table() -> None:
    place = SimpleNamespace(file=SimpleNamespace(src_uri="api/a.md"))
    text = hooks["with_names"]("# A\n\n::: effformer.warm\n")
    hooks["on_page_markdown"](text, place, SimpleNamespace(repo_url=None))
    with pytest.raises(hooks["PluginError"], match=r"api/a\.md: its table of names is old; run "):
        hooks["on_page_markdown"](text.replace("Compile", "Make"), place, SimpleNamespace(repo_url=None))
