"""Run pages' scripts, each in a process of its own that finds PyTorch and timm imported: that takes most of the time.

Reads lines from stdin: a folder with page.py. Runs it there, what it prints going to the folder's output.txt, and
prints its exit status.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback

from effformer.bench.measure.timm_model import import_timm


def run(folder: str) -> int:
    """The exit status of the page's script; does not return to the caller's imports, variables or folder."""
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv, sys.path[0] = ["page.py"], folder
    try:
        runpy.run_path("page.py", run_name="__main__")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def main() -> None:
    import_timm()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(run(line.rstrip("\n")))
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
