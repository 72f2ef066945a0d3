"""Write files whole: beside their target, renamed when complete."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TypeAlias

Content: TypeAlias = bytes | bytearray | memoryview | str


def write_whole(path: str | Path, content: Content) -> None:
    """Write a file, whole or not at all.

    The content goes to a hidden folder beside `path` and is renamed when it is complete: a full disk, a signal or
    another reader never meets half a file. A new file is readable as the umask says, an old one keeps its mode. Of a
    symbolic link, the target is replaced. Missing folders are made.

    Args:
        path: the file; an existing one is replaced, unless it is read-only.
        content: its bytes, or text, which is written as UTF-8.

    Raises:
        OSError: naming `path`, where it cannot be written, or is a folder or a device.
    """
    write_together({path: content})


def write_together(files: Mapping[str | Path, Content]) -> None:
    """Write files that belong together: none is replaced before all are complete; else as `write_whole`.

    Args:
        files: path -> content.

    Raises:
        OSError: naming the path that cannot be written.
    """
    with contextlib.ExitStack() as stack:
        complete = [(path, *_written_beside(path, content, stack)) for path, content in files.items()]
        for path, partial, target in complete:
            with _one_error(path):
                os.replace(partial, target)


def append_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Add lines to the end of a text file of JSON lines, all or none.

    An incomplete last line, as a killed process leaves it, is removed first; one that only lacks its line end gets it.
    The file is not rewritten, and locked meanwhile (not on Windows), so that two processes may add to it. Missing
    folders and a missing file are made.

    Args:
        path: the file.
        lines: without line ends; written as UTF-8.

    Raises:
        OSError: naming `path`, where it cannot be written; it then ends as before.
    """
    path, content = Path(path), memoryview("".join(f"{line}\n" for line in lines).encode())
    with _one_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as file, _locked(file):
            file.seek(0)
            before = file.read()
            end = before.rfind(b"\n") + 1
            if _is_json(before[end:]):
                content, end = memoryview(b"\n" + content), len(before)
            file.truncate(end)
            try:
                while content:
                    content = content[file.write(content) :]
            except BaseException:  # Ctrl-C, too
                file.truncate(end)
                raise


@contextlib.contextmanager
def _locked(file: IO[bytes]) -> Iterator[None]:
    """Let other processes wait for an open file until it is closed."""
    with contextlib.suppress(ImportError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _written_beside(path: str | Path, content: Content, stack: contextlib.ExitStack) -> tuple[Path, Path]:
    """(a complete file in a folder that `stack` removes, its place)."""
    with _one_error(path):
        target = Path(os.path.realpath(path))
        if target.is_symlink():
            raise OSError("it is a symbolic link in a circle")
        if target.exists() and not target.is_file():
            raise OSError("it is not a regular file")
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError("it is read-only")
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.TemporaryDirectory(prefix=".effformer-", dir=target.parent, ignore_cleanup_errors=True)
        partial = Path(stack.enter_context(beside)) / "partial"
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        if target.exists():
            partial.chmod(target.stat().st_mode & 0o7777)
        return partial, target


@contextlib.contextmanager
def _one_error(path: str | Path) -> Iterator[None]:
    """Name the path in an OSError, which keeps its class."""
    try:
        yield
    except OSError as error:
        named = type(error)(f"{path} cannot be written: {error.strerror or error}")
        named.errno = error.errno
        raise named from error
