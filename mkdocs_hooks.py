"""Parts of `make docs`: links out of `docs/`, the repository's address once it has one, docstrings, tables of names.

The pages in docs/api show docstrings on the site alone. For readers on a code host each has a table of its names, which
`.venv/bin/python mkdocs_hooks.py` writes anew.
"""

from __future__ import annotations

import functools
import posixpath
import re
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import griffe
from mkdocs.exceptions import PluginError

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent
_setup = runpy.run_path(str(ROOT / "setup.py"))
_ARGUMENTS = re.compile(r"^Args:\n(?: .*\n|\n)*", re.MULTILINE)
_JOINT = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+)(?P<text>: .*\n(?:(?P=indent) +.*\n)*)", re.MULTILINE)
_ENTRY = re.compile(r"^::: effformer\.(\S+)$", re.MULTILINE)
_BEGIN, _END = "<!-- names, by mkdocs_hooks.py -->\n", "<!-- /names -->\n\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.repo_url = _setup["source_url"]()
    return config


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **rest: Any) -> str:
    if with_names(markdown) != markdown:
        raise PluginError(f"{page.file.src_uri}: its table of names is old; run .venv/bin/python mkdocs_hooks.py")
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def path_of(target: str) -> str | None:
        path = posixpath.normpath(posixpath.join(folder, target))
        return None if path.startswith("docs/") else path

    relinked: str = _setup["relink"](markdown, config.repo_url, path_of)
    return relinked


@functools.cache
def _package() -> griffe.Object | griffe.Alias:
    return griffe.load("effformer", search_paths=[ROOT])


def with_names(markdown: str) -> str:
    """A page of docs/api with the table of its names before the first entry: each with its docstring's first line.

    An entry that is a module has rows for the documented names defined in it, too. Each name links to its source.
    """
    markdown = re.sub(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", "", markdown, flags=re.DOTALL)
    first = _ENTRY.search(markdown)
    if first is None:
        return markdown
    rows = "".join(row for name in _ENTRY.findall(markdown) for row in _rows(name))
    table = f"| `effformer.` | |\n|---|---|\n{rows}"
    return f"{markdown[: first.start()]}{_BEGIN}\n{table}\n{_END}{markdown[first.start() :]}"


def _rows(name: str) -> list[str]:
    """The table's lines for a name in effformer."""
    found = {name: _package()[name]}
    if found[name].is_module:
        members = found[name].members.items()
        found |= {f"{name}.{key}": one for key, one in members if not one.is_alias and not key.startswith("_")}
    rows = []
    for key, one in found.items():
        if one.docstring is not None:
            line = one.docstring.value.splitlines()[0].replace("|", r"\|")
            rows.append(f"| [`{key}`](../../{one.filepath.relative_to(ROOT).as_posix()}) | {line} |\n")
    return rows


def one_entry_each(docstring: str) -> str:
    """The docstring with an entry for each of several arguments that share one: "scale, shift: [C]." becomes two."""

    def split(match: re.Match[str]) -> str:
        return "".join(f"{match['indent']}{name}{match['text']}" for name in match["names"].split(", "))

    return _ARGUMENTS.sub(lambda section: _JOINT.sub(split, section[0]), docstring + "\n").removesuffix("\n")


class JointArguments(griffe.Extension):
    """Gives griffe a name, and so a type, for each argument."""

    def on_object(self, *, obj: griffe.Object, **rest: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = one_entry_each(obj.docstring.value)


if __name__ == "__main__":
    for path in sorted((ROOT / "docs" / "api").glob("*.md")):
        path.write_text(with_names(path.read_text(encoding="utf-8")), encoding="utf-8")
