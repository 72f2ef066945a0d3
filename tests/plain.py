"""Copies the package into a folder as pip would install it, for a Python without setuptools and wheel.

    python tests/plain.py FOLDER [NEEDED ...]

NEEDED are modules, or "gpu" for a GPU that torch sees. If this Python lacks any, one line names all of them, the exit
status is 1, and nothing is copied.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def lacking(needed: list[str]) -> list[str]:
    """Those of `needed` that are missing here, by the names that people install."""
    found = [] if sys.version_info >= (3, 11) else ["Python 3.11 or newer"]
    found += [{"yaml": "pyyaml"}.get(name, name) for name in needed if name != "gpu" and not _is_here(name)]
    if "gpu" in needed and "torch" not in found:
        import torch

        if not torch.cuda.is_available():
            found.append("a GPU that torch sees")
    return found


def _is_here(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def lay_out(folder: Path) -> None:
    """Copy the packages that pyproject.toml lists, and their data, to where an installation has them."""
    import tomllib  # new in 3.11: `lacking` runs on older ones, too

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    setup = tomllib.loads(text)["tool"]["setuptools"]
    for package in setup["packages"]:
        # The nearest folder that is mapped holds all below it.
        mapped = max((name for name in setup["package-dir"] if f"{package}.".startswith(f"{name}.")), key=len)
        source = ROOT.joinpath(setup["package-dir"][mapped], *package[len(mapped) :].split("."))
        target = folder.joinpath(*package.split("."))
        target.mkdir(parents=True, exist_ok=True)
        for pattern in ("*.py", *setup["package-data"].get(package, ())):
            for path in source.glob(pattern):
                shutil.copyfile(path, target / path.name)


def main() -> None:
    folder, *needed = sys.argv[1:]
    if missing := lacking(needed):
        sys.exit(f"{sys.executable} lacks {', '.join(missing)}")
    shutil.rmtree(folder, ignore_errors=True)
    lay_out(Path(folder))


if __name__ == "__main__":
    main()
