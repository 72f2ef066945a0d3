"""How a run goes on where another stopped: what figures hold for, and what was begun in vain."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from ...kernels.tiling.choose import KERNELS, digest_of, user_file
from .records import Machine

_PACKAGE = Path(sys.modules[__package__.partition(".")[0]].__path__[0])
CODE = (_PACKAGE, KERNELS, Path(__file__).parents[1])


@functools.cache
def sources(*folders: Path) -> str:
    """A digest of the code that figures are of: the package, the kernels with their table, and the benchmarks.

    The commit is in the records as well, but committing results changes that.
    """
    tuned = user_file().read_bytes() if user_file().is_file() else b""  # tiles tuned here count as code
    parts = (digest_of(folder, "*.py", "*.json").encode() for folder in folders or CODE)
    return hashlib.sha256(b"".join(parts) + tuned).hexdigest()[:16]


class Attempts:
    """A file of attempts without an outcome, which outlives the process: whatever fails again and again is seen.

    Args:
        path: of the file.
        machine: attempts on another, or with other versions, do not count.
        code: what else they are of.
    """

    def __init__(self, path: Path, machine: Machine, code: Any) -> None:
        self.path, self.owner = path, [machine.gpu, machine.torch, machine.triton, code]

    def add(self, *what: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._line(what) + "\n")

    def count(self, *what: Any) -> int:
        return self._lines().count(self._line(what))

    def remove(self, *what: Any) -> None:
        """Take one back: it had an outcome."""
        lines, line = self._lines(), self._line(what)
        if line in lines:  # else another process has rewritten the file meanwhile
            lines.remove(line)
            self.path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []

    def _line(self, what: Any) -> str:
        return json.dumps([self.owner, *what])
