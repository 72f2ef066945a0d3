"""`make hub-kernels` writes builds that the package `kernels` loads, side by side and beside effformer."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from effformer.bench.release import hub_kernels
from effformer.kernels import operators
from full_disk import full_disk

from effformer import ops
from effformer.version import __version__

TESTS = Path(__file__).parent
ROOT = TESTS.parent
MAJOR = int(__version__.split(".")[0])


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    hub_kernels.main(["--out", str(folder)])
    return folder


def build_of(repository: Path, backend: str) -> Path:
    return repository / "build" / f"torch-{backend}"


def metadata_of(repository: Path, backend: str = "cpu") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((build_of(repository, backend) / "metadata.json").read_text(encoding="utf-8"))
    return found


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"} | environment
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_versions_and_effformer_compute_in_one_process(repository: Path, tmp_path: Path) -> None:
    """Each by kernels of its own, by the accuracy rule; tiles that were tuned for effformer are not taken."""
    newer = tmp_path / "newer"
    hub_kernels.write(newer, f"{MAJOR + 1}.2.0")
    cache = tmp_path / "cache"
    tuned = cache / "effformer" / "configurations.json"
    tuned.parent.mkdir(parents=True)
    tuned.write_text('{"fingerprint": {"kernels": "others", "triton": "0"}, "entries": []}', encoding="utf-8")
    worker = str(TESTS / "hub_worker.py")
    found = json.loads(python(worker, str(repository), str(newer), cwd=tmp_path, XDG_CACHE_HOME=str(cache)))

    assert found.pop("user's file") == str(tuned)
    first, second = metadata_of(repository), metadata_of(newer)
    assert (first["version"], second["version"]) == (MAJOR, MAJOR + 1)
    assert set(found) == {first["id"], second["id"], "effformer"}
    assert found[first["id"]]["version"] == __version__
    assert found[second["id"]]["version"] == f"{MAJOR + 1}.2.0"
    for namespace, build in found.items():
        for result in build["results"]:
            assert result["passes"], f"{namespace}, {result['operation']}: {result['accuracy']}"
            assert result["namespaces"] == [namespace], result["operation"]
    assert {result["operation"] for result in found[first["id"]]["results"]} == set(operators.__all__)
    assert found[first["id"]]["tuned"] == found[second["id"]]["tuned"] == 0


def test_the_loader_takes_the_backend_of_the_machine(repository: Path, tmp_path: Path) -> None:
    """It refuses torch-cuda where PyTorch has no CUDA, and takes it where PyTorch has."""
    alone = tmp_path / "alone"
    build_of(alone, "cuda").parent.mkdir(parents=True)
    build_of(alone, "cuda").symlink_to(build_of(repository, "cuda"))
    code = (
        "import pathlib, sys, kernels, torch\n"
        "both, cuda = map(pathlib.Path, sys.argv[1:])\n"
        "torch.version.cuda = torch.version.hip = None\n"
        "for options in ({'repo_path': cuda}, {'repo_path': both, 'backend': 'cuda'}):\n"
        "    try:\n        kernels.get_local_kernel(**options)\n"
        "    except (FileNotFoundError, ValueError) as error:\n        print(str(error).splitlines()[-1])\n"
        "print(kernels.get_local_kernel(both).__name__)\n"
        "torch.version.cuda = '13.0'\n"
        "module = kernels.get_local_kernel(both)\n"
        "print(module.__name__)\n"
        "print(module.pool_mixer(torch.ones(1, 4, 3, 3), torch.ones(4)).sum().item())"
    )
    alone_refused, asked_refused, cpu, cuda, total = python(
        "-P", "-c", code, str(repository), str(alone), cwd=tmp_path
    ).splitlines()
    assert alone_refused.startswith("torch-cuda: backend (cuda) does not match system backend (cpu)")
    assert asked_refused == "Invalid backend 'cuda', system supported backends: cpu"
    assert cpu == metadata_of(repository, "cpu")["id"]
    assert cuda == metadata_of(repository, "cuda")["id"]
    assert float(total) == 36


@pytest.mark.parametrize("backend", hub_kernels.BACKENDS)
def test_files_are_python_3_9_and_import_only_themselves_torch_and_triton(repository: Path, backend: str) -> None:
    folder = build_of(repository, backend)
    files = sorted(folder.rglob("*.py"))
    assert folder / "kernels" / "tiling" / "choose.py" in files
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                home = path.parents[node.level - 1] / (node.module or "").replace(".", "/")
                modules = [home] if node.module else [home / alias.name for alias in node.names]
                for module in modules:
                    assert module.with_suffix(".py").exists() or (module / "__init__.py").exists(), f"{path}: {module}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
                roots = {name.partition(".")[0] for name in names}
                assert roots <= {"torch", "triton", *sys.stdlib_module_names}, path


def test_ruff_finds_no_syntax_newer_than_python_3_9(repository: Path) -> None:
    pytest.importorskip("ruff")
    python("-m", "ruff", "check", "--isolated", "--target-version", "py39", "--select", "E9", ".", cwd=repository)


@pytest.mark.parametrize("backend", hub_kernels.BACKENDS)
def test_metadata_describes_the_build(repository: Path, backend: str) -> None:
    folder, metadata = build_of(repository, backend), metadata_of(repository, backend)
    digests = {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in folder.rglob("*")
        if path.suffix in (".py", ".json") and path.name != "metadata.json"
    }
    assert metadata.pop("digest") == {"algorithm": "sha256", "files": digests}
    identifier = metadata.pop("id")
    assert identifier.isidentifier()
    assert identifier.startswith(f"_effformer_{backend}_")
    assert metadata == {
        "name": "effformer",
        "version": MAJOR,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }


def test_each_build_has_an_id_of_its_own() -> None:
    """The same sources give the same one; another backend, version, kernel or table of tiles gives another."""
    files = hub_kernels.sources()
    changed = [
        files | {name: files[name] + "\n"}
        for name in ("kernels/rows.py", "kernels/tiling/configurations.json", "ops.py")
    ]
    builds = [
        hub_kernels.build("cpu", files),
        hub_kernels.build("cuda", files),
        hub_kernels.build("cpu", files, "0.1.1"),
        *(hub_kernels.build("cpu", one) for one in changed),
    ]
    ids = [json.loads(one["metadata.json"])["id"] for one in builds]
    assert len(set(ids)) == len(ids)
    assert hub_kernels.build("cpu", hub_kernels.sources()) == builds[0]


def test_a_build_offers_the_operations_and_what_prepares_their_arguments(repository: Path) -> None:
    homes = {f"effformer.{module}" for module in ("ops", "reference", "attention_bias")}
    functions = {
        name
        for name, value in vars(ops).items()
        if getattr(value, "__module__", None) in homes and not name.startswith("_")
    }
    assert set(operators.__all__) < functions
    tree = ast.parse((build_of(repository, "cpu") / "__init__.py").read_text(encoding="utf-8"))
    exports = {one.targets[0].id: one.value for one in tree.body if isinstance(one, ast.Assign)}  # type: ignore[attr-defined]
    offered = ast.literal_eval(exports["__all__"])
    assert functions <= set(offered)
    card = (repository / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\ntags:\n")
    assert all(f"- `{name}`" in card for name in functions)
    for package, dependency in (("torch", "torch"), ("Triton", "triton")):
        (least,) = re.findall(rf'"{dependency}>=([\d.]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        assert f"{package} {least} or newer" in card
    assert "Apache License" in (repository / "LICENSE").read_text(encoding="utf-8")


def test_a_new_build_replaces_the_older_one_alone(tmp_path: Path) -> None:
    hub_kernels.write(tmp_path, "0.0.1")
    stale, other = build_of(tmp_path, "cpu") / "stale.py", tmp_path / "build" / "other" / "kept"
    stale.touch()
    other.parent.mkdir()
    other.touch()
    hub_kernels.write(tmp_path)
    assert not stale.exists()
    assert other.exists()
    assert metadata_of(tmp_path) == json.loads(hub_kernels.build("cpu", hub_kernels.sources())["metadata.json"])


@pytest.mark.parametrize(
    "readme",
    ["# A project\n\nlibrary_name: kernels\n", "---\nlibrary_name: timm\n---\nlibrary_name: kernels\n", "", None],
    ids=["text", "another library", "empty", "none"],
)
def test_another_projects_files_stay(readme: str | None, tmp_path: Path) -> None:
    files = {"LICENSE": "theirs"} if readme is None else {"README.md": readme, "LICENSE": "theirs"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    named = f"out: got {re.escape(str(tmp_path))}, where {next(iter(files))} belongs to another project, allowed is"
    with pytest.raises(SystemExit, match=named):
        hub_kernels.main(["--out", str(tmp_path)])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("share", [0.1, 0.99])
def test_a_full_disk_leaves_the_older_build(share: float, tmp_path: Path) -> None:
    """Also where it is the largest file alone that finds no room."""
    hub_kernels.write(tmp_path, "0.0.1")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    room = int(share * max(map(len, before.values())))
    with full_disk(room), pytest.raises(OSError, match="cannot be written: File too large"):
        hub_kernels.write(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_line_that_moved_is_an_error() -> None:
    files = hub_kernels.sources()
    files["kernels/register.py"] = files["kernels/register.py"].replace(
        'NAMESPACE = "effformer"', 'NAMES = "effformer"'
    )
    with pytest.raises(ValueError, match=r"kernels/register\.py: got 0 times .*NAMESPACE.*, allowed is once"):
        hub_kernels.build("cpu", files)


def test_make_keeps_the_folder_and_git_ignores_it() -> None:
    recipes = subprocess.run(
        ["make", "--dry-run", "clean", "types"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    removed = [line for line in recipes.splitlines() if line.startswith("rm -rf")]
    assert len(removed) == 2
    assert not any("hub-kernels" in line or "*" in line.replace("*.egg-info", "") for line in removed)
    assert "hub-kernels/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
