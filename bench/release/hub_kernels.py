"""The fused operations in the layout of Hugging Face's kernels hub (`make hub-kernels`), for the package `kernels`.

The hub's rules: https://huggingface.co/docs/kernels/kernel-requirements. A build is a folder for each backend, with the
same sources: `effformer.ops`, the modules that it imports, and all kernels. They import each other relatively, so that
builds of several versions run in one process. Two lines differ from the package, see `SUBSTITUTED`.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import effformer

from ...files import write_together, write_whole
from ...version import __version__

NAME = "effformer"
LICENCE = "apache-2.0"  # as the hub writes it
BACKENDS = ("cpu", "cuda")
MODULES = (
    "attention_bias.py",
    "backend.py",
    "checks.py",
    "config.py",
    "gradients.py",
    "ops.py",
    "reference.py",
    "train_ops.py",
)

# The public names of a build, from `effformer.ops`.
PUBLIC = (
    "ACTIVATIONS",
    "BACKENDS",
    "PIXEL_OFFSET",
    "UnsupportedError",
    "attention_mixer",
    "bias_attention",
    "conv_mlp",
    "conv_norm",
    "expand_bias",
    "fold_batch_norm",
    "fold_layer_scale",
    "head",
    "linear_mlp",
    "meta4d",
    "pool_mixer",
    "prepare_bias",
    "upcast",
    "why_not_triton",
)

# file -> the text that stands in it once, and its replacement. Operators are registered under the build's own name.
# Tiles that were tuned on the user's machine are for effformer's own kernels: with another name of their file, a build
# neither reads them nor warns that they are for others.
SUBSTITUTED = {
    "kernels/register.py": ('NAMESPACE = "effformer"', 'NAMESPACE = "{id}"'),
    "kernels/tiling/choose.py": ('/ "effformer" / "configurations.json"', '/ "effformer" / "{id}.json"'),
}

_INIT = '''"""Fused operations of EfficientFormer (arXiv 2206.01191), those of effformer {version}."""

import importlib.util

from .ops import (
{imports}
)

if importlib.util.find_spec("triton") is not None:
    from .kernels import operators  # registers torch.ops.{id}

__version__ = "{version}"
__all__ = [
{exports}
]
'''

_LIBRARY = "library_name: kernels"  # the hub knows its kernels by it
_CARD = """---
{library}
license: {licence}
tags:
  - kernels
  - triton
  - efficientformer
---

# {name}

Fused operations of [EfficientFormer](https://arxiv.org/abs/2206.01191) for inference, as Triton kernels. Made from
effformer {version}.

They need torch 2.11 or newer and, for the kernels, Triton 3.6 or newer and an NVIDIA GPU of compute capability 8.0 or
newer. Elsewhere, and where a gradient is needed, the same functions compute in plain PyTorch.

## Use

OWNER is the account that this repository belongs to.

```python
import torch
from kernels import get_kernel

effformer = get_kernel("OWNER/{name}", version={major}, trust_remote_code=True)
device = "cuda" if torch.cuda.is_available() else "cpu"
x = torch.randn(8, 48, 56, 56, device=device).to(memory_format=torch.channels_last)
layer_scale = torch.full((48,), 0.5, device=device)
with torch.no_grad():
    mixed = effformer.pool_mixer(x, layer_scale)  # x + layer_scale * (avg_pool(x) - x)
```

Each function's docstring gives shapes, dtypes and errors.

## Available functions

{functions}
"""


def sources() -> dict[str, str]:
    """The package's files that a build is made from, by their path in it."""
    package = Path(effformer.__file__).parent
    found = {name: package / name for name in MODULES}
    spec = importlib.util.find_spec("effformer.kernels")  # beside the package in a checkout
    if spec is None or spec.origin is None:
        raise FileNotFoundError("effformer.kernels: it is not installed")
    kernels = Path(spec.origin).parent
    for path in sorted([*kernels.rglob("*.py"), *kernels.rglob("*.json")]):
        found[f"kernels/{path.relative_to(kernels).as_posix()}"] = path
    return {name: path.read_text(encoding="utf-8") for name, path in found.items()}


def build(backend: str, files: Mapping[str, str], version: str = __version__) -> dict[str, str]:
    """The files of one build, by their path in it.

    Args:
        backend: one of `BACKENDS`.
        files: as `sources` gives them.
        version: of effformer. The hub counts its first number alone.

    Raises:
        ValueError: if a line that has to be substituted does not stand once in its file.
    """
    # Everything that makes the build what it is, but its name.
    content = json.dumps([backend, version, _build("", files, version)], sort_keys=True)
    identifier = f"_{NAME}_{backend}_{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    made = _build(identifier, files, version)
    made["metadata.json"] = json.dumps(_metadata(identifier, backend, made, version), indent=2) + "\n"
    return made


def _build(identifier: str, files: Mapping[str, str], version: str) -> dict[str, str]:
    """The files of a build with this name, without its metadata."""
    made = dict(files)
    for name, (old, new) in SUBSTITUTED.items():
        if (count := made[name].count(old)) != 1:
            raise ValueError(f"{name}: got {count} times {old!r}, allowed is once")
        made[name] = made[name].replace(old, new.format(id=identifier))
    imports = "\n".join(f"    {name}," for name in PUBLIC)
    exports = "\n".join(f'    "{name}",' for name in PUBLIC)
    made["__init__.py"] = _INIT.format(id=identifier, version=version, imports=imports, exports=exports)
    return made


def _metadata(identifier: str, backend: str, made: Mapping[str, str], version: str) -> dict[str, object]:
    """The loader imports a build as `id`. A kernel of Python needs no list of a GPU's architectures."""
    digests = {name: hashlib.sha256(text.encode()).digest() for name, text in sorted(made.items())}
    return {
        "id": identifier,
        "name": NAME,
        "version": _major(version),
        "license": LICENCE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        },
    }


def _major(version: str) -> int:
    """The hub's version, which tells whether interfaces agree; it has 0 for those that may still change."""
    return int(version.partition(".")[0])


def card(version: str = __version__) -> str:
    """The README of the hub's repository."""
    functions = "\n".join(f"- `{name}`" for name in PUBLIC if name.islower())
    major = _major(version)
    return _CARD.format(library=_LIBRARY, name=NAME, version=version, major=major, licence=LICENCE, functions=functions)


def write(out: Path, version: str = __version__, files: Mapping[str, str] | None = None) -> None:
    """Write the hub's repository: README.md, LICENSE, and a folder for each backend, which replaces an older one.

    No older file is replaced before all new builds are complete.

    Args:
        out: the repository's folder; it may exist.
        version: of effformer.
        files: the sources; `sources` by default.

    Raises:
        OSError: naming a file that cannot be written.
        ValueError: as `build`, or where `out` holds another project's files.
    """
    files = sources() if files is None else files
    builds = {backend: build(backend, files, version) for backend in BACKENDS}
    targets = {backend: out / "build" / f"torch-{backend}" for backend in BACKENDS}
    replaced = [path for path in (out / "README.md", out / "LICENSE", *targets.values()) if path.exists()]
    if replaced and not _is_card(out / "README.md"):
        raise ValueError(
            f"out: got {out}, where {replaced[0].name} belongs to another project, allowed is an empty folder, "
            f"or one whose README.md has `{_LIBRARY}`"
        )
    (out / "build").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".effformer-", dir=out / "build", ignore_cleanup_errors=True) as beside:
        new, old = Path(beside, "new"), Path(beside, "old")
        for backend, made in builds.items():
            for name, text in made.items():
                write_whole(new / backend / name, text)
        write_together({out / "README.md": card(version), out / "LICENSE": _licence()})
        old.mkdir()
        for backend, target in targets.items():
            if target.exists():
                target.rename(old / backend)
            (new / backend).rename(target)


def _is_card(path: Path) -> bool:
    """Whether a file is a README of the kernels hub: its metadata stand between two lines of dashes."""
    if not path.is_file():
        return False
    first, *lines = [line.rstrip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()] or [""]
    return first == "---" and _LIBRARY in lines[: lines.index("---") if "---" in lines else 0]


def _licence() -> str:
    """The licence's text, which goes with every copy."""
    for path in metadata.files(NAME) or ():
        if path.name == "LICENSE":
            return path.read_text(encoding="utf-8")
    raise FileNotFoundError("LICENSE: the installed effformer does not have it")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("hub-kernels"), help="the repository (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        write(options.out)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(f"wrote {', '.join(f'torch-{backend}' for backend in BACKENDS)} to {options.out / 'build'}")


if __name__ == "__main__":
    main()
