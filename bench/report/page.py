"""The report as one static HTML page, with the pictures beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

from .comparison import Measured
from .tables import CPU_RUN, Table, kernel_tables, ladder_table, machine_table, summary_tables
from .targets import target_table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: #1a1a1a; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.2em; border-bottom: 1px solid #ccc; }
.cpu { color: #b00020; font-weight: bold; }
.scroll { overflow-x: auto; margin: 1em 0; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
th { background: #f2f2f2; }
td { white-space: nowrap; }
td.long { white-space: normal; min-width: 22em; }
td.bad { color: #b00020; font-weight: bold; }
td.good { color: #00663d; font-weight: bold; }
summary { cursor: pointer; font-weight: bold; }
p.remark { color: #555; font-size: 13px; max-width: 60em; }
img { max-width: 100%; height: auto; }
"""
LONG = 60  # characters, from which on a cell's text is wrapped


def page(measured: Measured, pictures: Iterable[tuple[str, str]]) -> str:
    """The page. `pictures`: (file name, what it shows); the files lie beside the page."""
    return "\n".join(_parts(measured, pictures)) + "\n"


def _parts(measured: Measured, pictures: Iterable[tuple[str, str]]) -> Iterator[str]:
    newest = measured.machines[0]
    title = f"effformer on {newest.gpu}"
    yield "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>"
    yield "<meta name='viewport' content='width=device-width'>"
    yield f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>"
    if not measured.is_gpu:
        yield f"<p class='cpu'>{escape(CPU_RUN)}.</p>"
    yield from _table(machine_table(measured.machines))
    if measured.is_gpu:
        yield from _section(target_table(measured))
    for table in summary_tables(measured):
        yield from _section(table)
    for name, text in pictures:
        yield f"<h2>{escape(text)}</h2>\n<p><img src='{escape(name)}' alt='{escape(text)}'></p>"
    if measured.backbones:
        yield "<h2>Every rung</h2>"
    for cell in measured.backbones:
        yield from _folded(ladder_table(cell))
    if measured.kernels:
        yield "<h2>Operations</h2>"
    for table in kernel_tables(measured):
        yield from _folded(table)
    yield "</body>\n</html>"


def _section(table: Table) -> Iterator[str]:
    yield f"<h2>{escape(table.title)}</h2>"
    yield from _table(table)


def _folded(table: Table) -> Iterator[str]:
    yield f"<details>\n<summary>{escape(table.title)}</summary>"
    yield from _table(table)
    yield "</details>"


def _table(table: Table) -> Iterator[str]:
    yield "<div class='scroll'><table>\n<tr>" + "".join(f"<th>{escape(name)}</th>" for name in table.header) + "</tr>"
    for row in table.rows:
        yield "<tr>" + "".join(f"<td{_class(text)}>{escape(text)}</td>" for text in row) + "</tr>"
    yield "</table></div>"
    if table.remark:
        yield f"<p class='remark'>{escape(table.remark)}</p>"


def _class(text: str) -> str:
    if text == "met":
        return " class='good'"
    if text in ("missed", "not run", "not measured", "NaN") or text.endswith(("(slower)", "in doubt")):
        return " class='bad'"
    return " class='long'" if len(text) > LONG else ""


def write_page(measured: Measured, folder: Path, pictures: Iterable[tuple[str, str]]) -> Path:
    target = folder / "index.html"
    target.write_text(page(measured, pictures), encoding="utf-8")
    return target
