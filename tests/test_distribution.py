"""The source distribution, the wheel, and a checkout as torch.hub loads it."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import plain
import pytest
import release_version
import yaml

from effformer import __version__

ROOT = Path(__file__).parent.parent
PACKAGES = ("effformer", "kernels", "bench")
JUNK = ("effformer/checks.py.orig", "docs/.page.md.swp", "bench/results/records.jsonl", "kernels/__pycache__/a.pyc")
setup = runpy.run_path(str(ROOT / "setup.py"))


class Built(NamedTuple):
    source: Path  # copy of the checkout
    sdist: Path  # unpacked
    wheel: Path  # of the unpacked source distribution


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built without a network, from a copy of the checkout with some files that belong in no distribution."""
    folder = tmp_path_factory.mktemp("built")
    source, output = folder / "source", folder / "dist"
    ignore = shutil.ignore_patterns("__pycache__", "results", "golden")
    for name in (*PACKAGES, "docs", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    for name in JUNK:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("junk")
    # The wheel is built from the source distribution, as `build` does by default.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, source, cwd=folder)
    (archive,), (wheel,) = output.glob("*.tar.gz"), output.glob("*.whl")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return Built(source, folder / f"effformer-{__version__}", wheel)


@pytest.fixture(scope="module")
def python(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with the wheel; torch and the rest are seen by a path."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    executable = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(executable), "install", "--no-index", "--no-deps"]
    run(*pip, "-c", ROOT / "constraints.txt", built.wheel, cwd=folder)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")  # whose own .pth files are not read
    return executable


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_source_distribution_holds_what_is_needed_and_no_junk(built: Built) -> None:
    found = {name for name in files(built.sdist) if not name.startswith("effformer.egg-info/")}
    code = {
        name
        for package in PACKAGES
        for name in files(built.source / package)
        if name.endswith((".py", "py.typed", "libcuda.c", "configurations.json")) and not name.startswith("benchmarks/")
        for name in [f"{package}/{name}"]
    }
    pages = {f"docs/{name}" for name in files(built.source / "docs")} - {*JUNK}
    rest = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md",
            "constraints.txt", "hubconf.py", "mkdocs.yml", "mkdocs_hooks.py", "pyproject.toml", "setup.cfg",
            "setup.py"}  # fmt: skip
    assert found == code | pages | rest


def test_the_wheel_holds_effformer_and_nothing_else(built: Built, tmp_path: Path) -> None:
    names = set(zipfile.ZipFile(built.wheel).namelist())
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"effformer"}
    plain.lay_out(tmp_path / "copied")  # `make gpu` has no pip: it tests what users get
    assert {name for name in names if name.startswith("effformer/")} == files(tmp_path / "copied")
    assert {
        "effformer/py.typed",
        "effformer/kernels/tiling/configurations.json",
        "effformer/bench/host/libcuda.c",
    } <= names


def test_the_wheel_is_the_same_from_a_checkout(built: Built, tmp_path: Path) -> None:
    command = ["-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, built.source]
    run(sys.executable, *command, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(built.wheel) as other:
        assert set(one.namelist()) == set(other.namelist())
        for name in one.namelist():
            assert name.endswith("/RECORD") or one.read(name) == other.read(name), name


def test_the_installed_wheel_runs(built: Built, python: Path, tmp_path: Path) -> None:
    out = run(
        python,
        "-c",
        "import sys\n"
        "sys.modules['triton'] = None\n"  # as where it is not installed
        "import effformer, effformer.kernels, effformer.bench.measure.timing, torch\n"
        "logits = effformer.create_model('efficientformer_l1').eval()(torch.zeros(1, 3, 32, 32))\n"
        "print(tuple(logits.shape), effformer.__file__)",
        cwd=tmp_path,
    )
    (site,) = (python.parents[1] / "lib").glob("python*/site-packages")
    assert out == f"(1, 1000) {site / 'effformer' / '__init__.py'}"
    assert run(python.with_name("effformer"), "--version", cwd=tmp_path) == f"effformer {__version__}"


# --- the description --------------------------------------------------------------------------------------------------


def test_the_description_has_no_link_that_breaks_on_an_index(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as file:
        metadata = file.read(f"effformer-{__version__}.dist-info/METADATA").decode()
    assert "Description-Content-Type: text/markdown" in metadata
    assert "From a photograph to class names" in metadata
    targets = re.findall(r"\]\(([^)]*)\)", metadata)
    assert len(targets) > 2
    assert [target for target in targets if not target.startswith("https://")] == []
    assert len(re.findall(r"^Project-URL: .*, https://", metadata, re.MULTILINE)) >= 2


@pytest.mark.parametrize(
    ("markdown", "without", "with_url"),
    [
        ("see [here](docs/a.md#b).", "see here.", "see [here](https://host/x/blob/HEAD/docs/a.md#b)."),
        ("![two\nlines](a.svg) x", " x", "![two\nlines](https://host/x/raw/HEAD/a.svg) x"),
        ("[a](https://b) [c](#d)", "[a](https://b) [c](#d)", "[a](https://b) [c](#d)"),
        ("```py\n[f][0](x)\n```\n[a](b)", "```py\n[f][0](x)\n```\na", "```py\n[f][0](x)\n```\n[a](https://host/x/blob/HEAD/b)"),
    ],
    ids=["link", "picture", "kept", "code"],
)  # fmt: skip
def test_links_of_a_description(markdown: str, without: str, with_url: str) -> None:
    assert setup["relink"](markdown, None, lambda target: target) == without
    assert setup["relink"](markdown, "https://host/x", lambda target: target) == with_url


# --- releases ---------------------------------------------------------------------------------------------------------


def test_the_files_name_one_version() -> None:
    assert release_version.disagreements(ROOT) == []


@pytest.mark.parametrize(
    ("tag", "changelog", "citation", "named"),
    [
        ("v1.2.3", "## [1.2.3] - 2030-01-02\n## [1.2.2] - 2030-01-01", "1.2.3", ""),
        ("v1.2.4", "## [1.2.3] - 2030-01-02", "1.2.3", "the tag: got 1.2.4, allowed is 1.2.3"),
        ("v1.2.3", "## [Unreleased]", "1.2.3", "the latest release in CHANGELOG.md: got None"),
        ("v1.2.3", "## [1.2.2] - 2030-01-01", "1.2.3", "the latest release in CHANGELOG.md: got 1.2.2"),
        ("v1.2.3", "## [1.2.3] - 2030-01-02", "1.2.2", "CITATION.cff: got 1.2.2"),
    ],
)
def test_a_tag_of_another_version_is_not_released(
    tag: str, changelog: str, citation: str, named: str, tmp_path: Path
) -> None:
    (tmp_path / "effformer").mkdir()
    (tmp_path / "effformer" / "version.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{changelog}\n")
    (tmp_path / "CITATION.cff").write_text(f"version: {citation}\n")
    found = release_version.disagreements(tmp_path, tag)
    assert len(found) == bool(named)
    assert "\n".join(found).startswith(named)


def test_a_release_waits_for_the_checks() -> None:
    """Each job that may publish needs the whole of CI on the commit that the tag names."""
    workflows = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").iterdir()}
    jobs = workflows["release.yml"]["jobs"]
    publishing = {name: job for name, job in jobs.items() if "id-token" in job.get("permissions", {})}
    assert {*publishing} == {"publish"}
    for job in publishing.values():
        called = {jobs[name].get("uses", "").removeprefix("./.github/workflows/") for name in job["needs"]}
        assert "ci.yml" in called
        assert "if" not in job  # such as always()
    ci = workflows["ci.yml"]
    assert "workflow_call" in ci[True]  # YAML reads the key `on` as a boolean
    assert {"run": "bash .ci/run"} in ci["jobs"]["check"]["steps"]


def test_lower_bounds_are_below_the_pins() -> None:
    """constraints.txt pins only what pyproject.toml allows."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    specifiers = {requirement.name.lower(): requirement.specifier for requirement in map(Requirement, listed)}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name for name, pin in pins.items() if pin not in specifiers.get(name, Requirement(name).specifier)} == set()


# --- torch.hub --------------------------------------------------------------------------------------------------------


def test_torch_hub_loads_from_a_checkout(tmp_path: Path) -> None:
    """Where effformer is not installed: the kernels and benchmarks lie beside it."""
    out = run(
        sys.executable,
        "-c",
        "import sys\n"
        "sys.meta_path = [finder for finder in sys.meta_path if '__editable__' not in repr(finder)]\n"
        "sys.path = [path for path in sys.path if 'effformer' not in path]\n"
        f"import os; os.chdir({os.fspath(tmp_path)!r})\n"
        "import torch\n"
        f"entry = lambda name, **rest: torch.hub.load({os.fspath(ROOT)!r}, name, source='local', **rest)\n"
        "model = entry('efficientformer_l1', num_classes=7, depths=(1, 1, 1, 2)).eval()\n"
        "print(tuple(model(torch.zeros(1, 3, 32, 32)).shape))\n"
        "print([entry(f'efficientformer_{size}', device='meta').config.widths[0] for size in ('l3', 'l7')])\n"
        "import effformer, effformer.kernels.tiling.choose, effformer.bench.measure.timing\n"
        "print(effformer.__file__, effformer.kernels.__file__, 'kernels' in sys.modules)",
        cwd=tmp_path,
    )
    where = f"{ROOT / 'effformer' / '__init__.py'} {ROOT / 'kernels' / '__init__.py'} False"
    assert out.splitlines() == ["(1, 7)", "[64, 96]", where]


def test_torch_hub_lists_the_networks_alone() -> None:
    module = runpy.run_path(str(ROOT / "hubconf.py"))
    entries = {name for name, value in module.items() if callable(value) and not name.startswith("_")}
    assert entries == {"efficientformer_l1", "efficientformer_l3", "efficientformer_l7"}
