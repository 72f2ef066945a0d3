"""Run pages' scripts, each in a process of its own that finds PyTorch and timm imported: that takes most of the time.

Reads lines from stdin: a folder with page.py. Runs it there, what it prints going to the folder's output.txt, and
prints its exit status.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys

from effformer.bench.measure.timm_model import import_timm


def run(folder: str) -> None:
    """Run the page's script as Python would, in this process."""
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv, sys.path[0] = ["page.py"], folder
    runpy.run_path("page.py", run_name="__main__")


def main() -> None:
    import_timm()
    for line in sys.stdin:
        process = multiprocessing.get_context("fork").Process(target=run, args=(line.rstrip("\n"),))
        process.start()
        process.join()
        sys.stdout.write(f"{process.exitcode}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
