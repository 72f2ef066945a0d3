"""What is installed, and what importing it drags along."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import mutants

ROOT = Path(__file__).parent.parent


def python(code: str, *, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_and_running_eagerly_drags_along_neither_triton_nor_extras() -> None:
    out = python(
        "import sys, effformer, torch\n"
        "effformer.create_model('efficientformer_l1').eval()(torch.zeros(1, 3, 32, 32))\n"
        "import effformer.cli, effformer.bench.measure.timing\n"
        "extras = 'PIL', 'detectron2', 'huggingface_hub', 'onnx', 'onnxscript', 'timm', 'torchvision', 'transformers'\n"
        "print([m for m in ('triton', 'effformer.kernels', *extras) if m in sys.modules])\n"
        "print(torch.cuda.is_initialized())"
    )
    assert out == "[]\nFalse"


def test_wheel_holds_effformer_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    source = tmp_path / "source"  # setuptools leaves its build folder behind
    source.mkdir()
    for name in ("effformer", "kernels", "bench", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(target)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"effformer"}
    for name in (
        "effformer/py.typed",
        "effformer/kernels/__init__.py",
        "effformer/bench/measure/timing.py",
        "effformer/kernels/tiling/configurations.json",
    ):
        assert name in names

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    out = python(
        f"import sys; sys.path = [{str(target)!r}] + [p for p in sys.path if 'effformer' not in p and p != {str(ROOT)!r}]\n"
        "sys.meta_path = [f for f in sys.meta_path if '__editable__' not in repr(f)]\n"
        "sys.modules['triton'] = None\n"  # as where it is not installed
        "import effformer, effformer.kernels, effformer.bench, importlib.util, torch\n"
        "effformer.create_model('efficientformer_l1').eval()(torch.zeros(1, 3, 32, 32))\n"
        "print(effformer.__file__, importlib.util.find_spec('kernels'))",
        cwd=elsewhere,
    )
    assert out == f"{target / 'effformer' / '__init__.py'} None"


def test_the_folder_kernels_does_not_pass_for_the_pypi_package() -> None:
    """Python started in the repository finds our folder under that name; transformers asks for the package so."""
    out = python(
        "import kernels\n"
        "print(kernels.__version__, hasattr(kernels, '__path__'), hasattr(kernels, '__wrapped__'))\n"
        "try:\n    from kernels import get_kernel\n"
        "except ImportError as error:\n    print(error)"
    )
    first, second = out.splitlines()
    assert first == "0.0.0 True False"
    assert "kernels.get_kernel" in second
    assert "effformer.kernels" in second
    import effformer.kernels

    assert not hasattr(effformer.kernels, "__version__")


def test_planted_faults_stand_where_they_should() -> None:
    """`make mutants` takes hours: that the code has moved on is better seen here."""
    for mutant in mutants.MUTANTS:
        assert (mutants.ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1, mutant.name
