"""Public names, the modules that an import loads, and the hints of errors."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import mutants

from effformer import extras

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


def test_public_names_resolve_and_are_listed() -> None:
    """Lazily, where extras are missing, and by `*`; torch comes with the first one that needs it."""
    out = python(
        "import sys, effformer\n"
        "assert 'torch' not in sys.modules\n"
        "effformer.EfficientFormerConfig, effformer.config.PRESETS, effformer.workload.OPERATIONS\n"
        "assert 'torch' not in sys.modules\n"
        "sys.modules['PIL'] = sys.modules['huggingface_hub'] = None\n"
        "names = {name for name in dir(effformer) if not name.startswith('_')}\n"
        "assert {*effformer.__all__} - {'__version__'} <= names\n"
        "rest = {name for name in names if name not in effformer.__all__}\n"
        "assert all(getattr(effformer, name).__name__ == f'effformer.{name}' for name in rest), rest\n"
        "from effformer import *\n"
        "assert all(globals()[name] is getattr(effformer, name) for name in effformer.__all__)\n"
        "assert callable(effformer.export) and callable(effformer.accelerate) and effformer.testing.randomise\n"
        "try:\n    effformer.no_such_name\nexcept AttributeError as error:\n    print(error)\n"
        "print(effformer.Preprocessing(), *sorted(rest))"
    )
    error, *rest = out.splitlines()
    assert error == "module 'effformer' has no attribute 'no_such_name'"
    assert rest[0].startswith("Preprocessing(size=(224, 224)")
    for name in ("accuracy", "backend", "checks", "config", "factory", "reference", "testing", "version", "workload"):
        assert f" {name}" in rest[0]


def test_type_checkers_see_the_names_that_are_imported_lazily() -> None:
    """The block for type checkers and the table for Python agree."""
    import effformer

    tree = ast.parse(Path(effformer.__file__).read_text(encoding="utf-8"))
    (typed,) = (node.body for node in tree.body if isinstance(node, ast.If))
    imports = [(node.module or "", alias.name) for node in typed for alias in node.names]  # type: ignore[attr-defined]
    lazy = [(home, name) for name, home in effformer._HOME_OF.items()] + [("", name) for name in effformer._MODULES]
    assert sorted(imports) == sorted(lazy)


def test_a_hint_installs_what_its_extra_does() -> None:
    """Hints are commands for people with a wheel or a checkout: the name of an extra alone installs nothing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra, requirements in extras._REQUIREMENTS.items():
        assert list(requirements) == project["optional-dependencies"][extra]
        assert shlex.split(extras.install(extra)) == ["pip", "install", *requirements]
    sources = [path for folder in ("effformer", "kernels", "bench") for path in (ROOT / folder).rglob("*.py")]
    assert not [path for path in sources if re.search(r"install '?effformer", path.read_text(encoding="utf-8"))]


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
    texts = {mutant.file: (mutants.ROOT / mutant.file).read_text(encoding="utf-8") for mutant in mutants.MUTANTS}
    counts = {mutant.name: texts[mutant.file].count(mutant.old) for mutant in mutants.MUTANTS}
    assert len(counts) == len(mutants.MUTANTS), "two mutants have one name"
    assert {name: count for name, count in counts.items() if count != 1} == {}
