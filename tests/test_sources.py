"""Results of old code must not pass as current: digests and lists of kernels reach files at any depth."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

from effformer.bench.measure import profile, records
from effformer.kernels.tiling import choose as config


def changed(folder: Path) -> None:
    """Add a line to the file that lies deepest."""
    deepest = max(folder.rglob("*.py"), key=lambda path: (len(path.parts), path))
    assert deepest.parent != folder
    deepest.write_text(deepest.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("__pycache__"))
    (target / "deep").mkdir()
    (target / "deep" / "one.py").write_text("one = 1\n", encoding="utf-8")
    return target


def test_a_change_at_any_depth_ends_tuned_tiles(tmp_path: Path) -> None:
    kernels = copy_of(config.KERNELS, tmp_path / "kernels")
    before = config.fingerprint(kernels)
    assert before == config.fingerprint(kernels)
    changed(kernels)
    assert before["kernels"] != config.fingerprint(kernels)["kernels"]


def test_a_change_at_any_depth_ends_figures(tmp_path: Path) -> None:
    assert {folder.name for folder in records.CODE} == {"effformer", "kernels", "bench"}
    for number, folder in enumerate(records.CODE):
        copy = copy_of(folder, tmp_path / str(number))
        before = records.sources(copy)
        records.sources.cache_clear()
        assert before == records.sources(copy)
        changed(copy)
        records.sources.cache_clear()
        assert before != records.sources(copy)


def test_every_kernel_counts_as_ours() -> None:
    defined = {
        node.name
        for path in config.KERNELS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert defined
    assert profile.own_kernels() == defined
