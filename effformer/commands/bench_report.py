"""Write a report, pictures and README's table from results.

Write report/README.md and its pictures for each GPU that has results of `effformer bench` and
`effformer bench kernels`: ours beside the fastest other, errors beside speeds, and the reasons of
measurements that were not run. It runs no measurement. --readme also writes the table between a README's
markers <!-- benchmark --> and <!-- /benchmark -->. With --check no file is written, and the exit status
is 1 if that table differs.

For example:
  effformer bench report
  effformer bench report --readme README.md --check
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_whole
from . import common
from .bench import say_missing

if TYPE_CHECKING:
    from ..bench.report.comparison import ResultsFolder


def add(commands: common.Commands) -> None:
    option = common.add_command(commands, "report", main, __doc__).add_argument
    option("--results", type=Path, default=Path("bench/results"), metavar="FOLDER", help="holds a folder for each "
           "GPU; default: %(default)s")  # fmt: skip
    option("--gpu", metavar="NAME", help="its folder there, such as nvidia-h200; default: every one")
    option("--output", type=Path, metavar="FOLDER", help="default: report/ in the folder of results")
    option("--readme", type=Path, metavar="FILE", help="a README with the markers")
    option("--check", action="store_true", help="only say whether FILE agrees with the results")


def main(arguments: argparse.Namespace) -> int:
    from ..bench.report.comparison import NETWORKS, OPERATIONS, read_folder

    if arguments.check and arguments.readme is None:
        raise ValueError("--check: got no --readme, allowed is only together with the file to check")
    if arguments.readme is not None and arguments.gpu is not None:
        raise ValueError("--readme: got --gpu as well, allowed is only without: README shows every GPU measured")
    files = (NETWORKS, OPERATIONS)
    known = {path.parent.name: path.parent for name in files for path in sorted(arguments.results.glob(f"*/{name}"))}
    if arguments.gpu is not None and arguments.gpu not in known:
        names = ", ".join(sorted(known)) or "none: it has no results"
        raise ValueError(f"--gpu: got {arguments.gpu!r}, allowed in {arguments.results} are {names}")
    folders = [known[name] for name in sorted(known) if arguments.gpu in (None, name)]
    if not folders and arguments.readme is None:
        raise ValueError(f"--results: got {arguments.results}, which has no results; allowed is a folder that "
                         f"holds <gpu>/{NETWORKS} or <gpu>/{OPERATIONS}, as `effformer bench` writes them")  # fmt: skip
    if arguments.output is not None and len(folders) != 1:
        raise ValueError(f"--output: got {len(folders)} folders of results, allowed is one: name it by --gpu")
    found = [read_folder(folder) for folder in folders]
    if not arguments.check:
        _write_reports(found, arguments.output)
    if arguments.readme is None:
        return 0
    return _readme(arguments.readme, found, check=arguments.check)


def _write_reports(found: list[ResultsFolder], output: Path | None) -> None:
    from ..bench.report.readme import report

    say_missing(print)
    for results in found:
        folder = output or results.folder / "report"
        pictures = []
        if importlib.util.find_spec("matplotlib") is not None:
            from ..bench.report.plots import draw

            pictures = draw(results, folder)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "README.md"
        write_whole(target, report(results, pictures))
        print(f"written: {target}, {len(pictures)} pictures")


def _readme(path: Path, found: list[ResultsFolder], *, check: bool) -> int:
    from ..bench.report.readme import with_results

    text = path.read_text(encoding="utf-8")
    wanted = with_results(text, found, path.resolve().parent)
    if text == wanted:
        print(f"{path} agrees with the results")
        return 0
    if check:
        print(f"effformer: {path} differs from the results: effformer bench report --readme {path}", file=sys.stderr)
        return 1
    write_whole(path, wanted)
    print(f"written: {path}")
    return 0
