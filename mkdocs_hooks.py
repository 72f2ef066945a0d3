"""Parts of `make docs`: links out of `docs/`, the repository's address once it has one, and docstrings."""

from __future__ import annotations

import posixpath
import re
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import griffe

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

_setup = runpy.run_path(str(Path(__file__).with_name("setup.py")))
_ARGUMENTS = re.compile(r"^Args:\n(?: .*\n|\n)*", re.MULTILINE)
_JOINT = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+)(?P<text>: .*\n(?:(?P=indent) +.*\n)*)", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.repo_url = _setup["source_url"]()
    return config


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **rest: Any) -> str:
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def path_of(target: str) -> str | None:
        path = posixpath.normpath(posixpath.join(folder, target))
        return None if path.startswith("docs/") else path

    relinked: str = _setup["relink"](markdown, config.repo_url, path_of)
    return relinked


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
