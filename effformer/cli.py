"""The command `effformer`: assembles the commands and runs one of them."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from .commands import (
    bench,
    bench_counts,
    bench_kernels,
    bench_report,
    convert,
    evaluate,
    export,
    info,
    run,
    tune,
    verify,
)
from .commands.common import NOT_WRITTEN
from .version import __version__

INTERRUPTED, PIPE_CLOSED = 130, 141  # 128 + SIGINT, 128 + SIGPIPE, as a shell has it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        the exit status: that of the command, mostly 0 or 1; 130 after Ctrl-C; 141 if a pipe that took the output was
        closed.

    Raises:
        SystemExit: after --help and --version (0), and for a wrong call (2).
    """
    arguments = argparse.Namespace(kept=NOT_WRITTEN)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names of files need not be text
    try:
        try:
            _parser().parse_args(_with_run([*(sys.argv[1:] if argv is None else argv)]), arguments)
            status: int = arguments.main(arguments)
        finally:
            print(end="", flush=True)  # a closed pipe shows here, not at Python's exit
    except KeyboardInterrupt:
        print(f"effformer: interrupted; {arguments.kept}", file=sys.stderr)
        return INTERRUPTED
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            return PIPE_CLOSED
        if isinstance(error, RuntimeError) and not type(error).__module__.startswith("effformer."):
            raise  # a fault of PyTorch or of ours: its traceback is wanted
        print(f"effformer: error: {error}", file=sys.stderr)
        return 1
    return status


def _stdout_is_closed() -> bool:
    """Whether stdout is the pipe that broke. It is then replaced, so that Python does not complain at exit."""
    try:
        print(flush=True)  # no harm, if it was another pipe
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _with_run(arguments: list[str]) -> list[str]:
    """Turn `bench [options]` into `bench run [options]`, but not a question for help."""
    command, option = [*arguments, "", ""][:2]
    if command == "bench" and option[:1] in ("", "-") and option not in ("-h", "--help"):
        return ["bench", "run", *arguments[1:]]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="effformer", description="Run, check, convert and measure EfficientFormer networks."
    )
    parser.add_argument("--version", action="version", version=f"effformer {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (run, verify, evaluate):
        command.add(commands)
    measuring = commands.add_parser(
        "bench",
        help="measure speed, and search for the fastest tiles",
        description="Measure on this machine. `effformer bench [options]` means `effformer bench run [options]`.",
    ).add_subparsers(required=True, metavar="COMMAND")
    for command in (bench, bench_kernels, bench_report, bench_counts, tune):
        command.add(measuring)
    for command in (info, convert, export):
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
