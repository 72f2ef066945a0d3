"""Write files whole: beside their target, renamed when complete."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(path: str | Path, content: bytes | memoryview | str) -> None:
    """Write a file, whole or not at all.

    The content goes to a hidden folder beside `path` and is renamed when it is complete: a full disk, a signal or
    another reader never meets half a file. A new file is readable as the umask says, an old one keeps its mode. Of a
    symbolic link, the target is replaced. Missing folders are made.

    Args:
        path: the file; an existing one is replaced.
        content: its bytes, or text, which is written as UTF-8.

    Raises:
        OSError: naming `path`, where it cannot be written, or is a folder or a device.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        raise OSError(f"{path} cannot be written: it is no regular file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".effformer-", dir=target.parent) as folder:
            partial = Path(folder) / "partial"
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
            if target.exists():
                partial.chmod(target.stat().st_mode & 0o7777)
            os.replace(partial, target)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
