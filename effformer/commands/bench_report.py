"""`effformer bench report`: a page, pictures and README's table from results files."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from ..bench.report.comparison import BACKBONES, KERNELS, Measured, measured


def main(arguments: argparse.Namespace) -> int:
    if arguments.check and arguments.readme is None:
        raise ValueError("--check: got no --readme, allowed is only together with the file to check")
    if arguments.readme is not None and arguments.gpu is not None:
        raise ValueError("--readme: got --gpu as well, allowed is only without: README shows every GPU measured")
    folders = _folders(arguments.results, arguments.gpu)
    if not folders and arguments.readme is None:
        raise ValueError(f"--results: got {arguments.results}, where nothing was measured; allowed is a folder that "
                         f"holds <gpu>/{BACKBONES} or <gpu>/{KERNELS}, as `effformer bench` writes them")  # fmt: skip
    if arguments.output is not None and len(folders) != 1:
        raise ValueError(f"--output: got {len(folders)} folders of results, allowed is one: name it by --gpu")
    found = [measured(folder) for folder in folders]
    if not arguments.check:
        _write_reports(found, arguments.output)
    if arguments.readme is None:
        return 0
    return _readme(arguments.readme, found, check=arguments.check)


def _folders(results: Path, gpu: str | None) -> list[Path]:
    known = sorted({path.parent for name in (BACKBONES, KERNELS) for path in results.glob(f"*/{name}")})
    if gpu is None:
        return known
    chosen = [folder for folder in known if folder.name == gpu]
    if not chosen:
        names = ", ".join(folder.name for folder in known) or "none: nothing was measured"
        raise ValueError(f"--gpu: got {gpu!r}, allowed in {results} are {names}")
    return chosen


def _write_reports(found: list[Measured], output: Path | None) -> None:
    if found and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("effformer bench report draws with matplotlib: pip install effformer[bench]")
    from ..bench.report.page import write_page
    from ..bench.report.plots import draw

    for results in found:
        folder = output or results.folder / "report"
        pictures = draw(results, folder)
        print(f"written: {write_page(results, folder, pictures)}, {len(pictures)} pictures")


def _readme(path: Path, found: list[Measured], *, check: bool) -> int:
    from ..bench.report.readme import with_results

    text = path.read_text(encoding="utf-8")
    wanted = with_results(text, found, path.resolve().parent)
    if text == wanted:
        print(f"{path} says what the results say")
        return 0
    if check:
        print(f"effformer: {path} differs from the results: effformer bench report --readme {path}", file=sys.stderr)
        return 1
    path.write_text(wanted, encoding="utf-8")
    print(f"written: {path}")
    return 0
