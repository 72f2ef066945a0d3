"""Every code block of README and of docs/ runs.

Of a page's blocks one script is made, which runs in an empty folder, offline, in a process of its own, on a CPU:

- ```python runs as it stands, in one namespace; but after a line that ends with "`name`:" a block is that file;
- ```sh is read by lines: `effformer ...` and `[NAME=value] python ...` run, but for the commands in `PARSED`, which take
  minutes or a GPU and are only parsed; of `make` the target is looked up, of `pip install` the extra;
- ```text is for reading; other blocks have to be files, or they would be blocks that nobody runs.

The folder holds the files that pages use: see `materials`. Trained weights come from a cache of the hub with random
ones.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import fake_hub
import page_runner
import pytest
import torch

import effformer
from effformer import create_model
from effformer.checkpoints.formats import convert_state_dict
from effformer.cli import _parser
from effformer.testing import randomise

ROOT = Path(__file__).parent.parent
API = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs" / "api").glob("*.md"))]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))

# Minutes on a CPU, or nothing to do there.
PARSED = ("effformer verify", "effformer bench")

_PROLOGUE = """\
import pathlib, subprocess, sys
import effformer.cli, effformer.bench.measure.timm_model

{shim}

def _effformer(*arguments):
    print("$ effformer", *arguments)
    status = effformer.cli.main(arguments)
    assert status == 0, f"exit status {{status}}"

def _python(environment, *arguments):
    import os
    print("$ python", *arguments)
    subprocess.run([sys.executable, *arguments], check=True, env=os.environ | environment)
"""


class Block(NamedTuple):
    language: str
    file: str | None  # that the line before names
    code: str
    line: int


def blocks(page: Path) -> list[Block]:
    """A page's fenced blocks, in order."""
    found: list[Block] = []
    before, fence, start = "", None, 0
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if fence is None and line.startswith("```"):
            fence, start = line[3:], number + 1
        elif fence is not None and line == "```":
            name = re.search(r"`([\w./-]+)`:$", before)
            found.append(Block(fence, name and name[1], "\n".join(lines[start:number]) + "\n", start + 1))
            fence, before = None, ""
        elif fence is None and line.strip():
            assert not line.startswith("    ") or before[:1] in ("-", " "), f"{page}:{number + 1}: use a fenced block"
            before = line
    assert fence is None, f"{page}: a block does not end"
    return found


def script(page: Path) -> str:
    """The script of the page's blocks."""
    libraries = ("timm", "torchvision", "transformers")
    needed = any(re.search(rf"import.*{name}|from.*{name}", block.code) for name in libraries for block in blocks(page))
    shim = "effformer.bench.measure.timm_model.import_torchvision()" if needed else ""
    parts = [_PROLOGUE.format(shim=shim)]
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        if block.file is not None:
            parts.append(f"pathlib.Path({block.file!r}).write_text({block.code!r})")
        elif block.language == "python":
            parts.append(f"# {where}\n{block.code}")
        elif block.language == "sh":
            parts += [call for line in block.code.splitlines() if (call := command(line, where))]
        else:
            assert block.language == "text", f"{where}: a block of {block.language or 'nothing'} that is no file"
    return "\n".join(parts)


def command(line: str, where: str) -> str | None:
    """The call that a shell line stands for; None where it was looked at here."""
    words = shlex.split(line, comments=True)
    if not words:
        return None
    environment = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    program, *arguments = words
    if program == "effformer" and not environment:
        if not line.startswith(PARSED):
            return f"_effformer(*{arguments!r})"
        _parser().parse_args(arguments if arguments[0] != "bench" or len(arguments) > 1 else ["bench", "run"])
    elif line.startswith("python -m pytest"):
        assert (ROOT / arguments[2]).exists(), f"{where}: {line}"
    elif program == "python":
        if Path(arguments[0]).parent == Path("docs/examples"):  # they have tests of their own
            assert (ROOT / arguments[0]).is_file(), f"{where}: {line}"
        else:
            return f"_python({environment!r}, *{arguments!r})"
    elif program == "make":
        names = [argument for argument in arguments if "=" not in argument]
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(names) <= set(targets), f"{where}: {line}"
    elif words[:2] == ["pip", "install"]:
        extras = re.search(r"\[(.*)\]", arguments[-1])
        known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
        assert set(extras[1].split(",") if extras else ()) <= set(known), f"{where}: {line}"
    else:
        assert program in ("torchrun", "git"), f"{where}: nobody runs {line!r}"
    return None


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hub that holds random weights under the names of the trained ones."""
    cache = tmp_path_factory.mktemp("hub")
    fake_hub.write(cache)
    return cache


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photo.jpg, folder/ and val/CLASS/ with a photograph, the 1000 classes' names in synsets.txt; checkpoint.pth and
    original.pth with L1's weights.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_image

    folder = tmp_path_factory.mktemp("materials")
    photo = Image.fromarray(load_sample_image("china.jpg"))
    synsets = [f"n{number:08}" for number in range(1000)]
    (folder / "synsets.txt").write_text("\n".join(synsets))
    for name in ("photo.jpg", "folder/photo.jpg", f"val/{synsets[7]}/photo.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        photo.save(folder / name)
    state = randomise(create_model("efficientformer_l1")).state_dict()
    torch.save(state, folder / "checkpoint.pth")
    torch.save(convert_state_dict(state, "original"), folder / "original.pth")
    return folder


@pytest.fixture(scope="module")
def run(hub: Path) -> Iterator[Callable[[Path], int]]:
    """Run page.py of a folder, and return its exit status; what it printed is in output.txt."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, page_runner.__file__]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as runner:
        assert runner.stdin is not None
        assert runner.stdout is not None

        def status(folder: Path) -> int:
            if 'os.environ["TRITON_INTERPRET"]' in (folder / "page.py").read_text(encoding="utf-8"):
                # Before Triton is imported, which timm has done in the other process.
                with (folder / "output.txt").open("w") as output:
                    own = [sys.executable, "page.py"]
                    return subprocess.run(own, cwd=folder, env=environment, stdout=output, stderr=output).returncode
            print(folder, file=runner.stdin, flush=True)
            return int(runner.stdout.readline())

        yield status
        runner.stdin.close()


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, run: Callable[[Path], int], materials: Path, tmp_path: Path) -> None:
    workplace = shutil.copytree(materials, tmp_path / "workplace")
    (workplace / "page.py").write_text(script(ROOT / page), encoding="utf-8")
    status = run(workplace)
    assert status == 0, f"{page}\n{(workplace / 'output.txt').read_text(encoding='utf-8')[-6000:]}"


@pytest.mark.parametrize("own", ["", "import os; os.environ[\"TRITON_INTERPRET\"] = '1'\n"])
@pytest.mark.parametrize(
    ("code", "status", "printed"),
    [
        ("print('fine')", 0, "fine"),
        ("assert 1 > 2, 'wrong'", 1, "AssertionError: wrong"),
        ("raise SystemExit('told')", 1, "told"),
        ("import os; os.abort()", -6, ""),
    ],
)
def test_a_page_that_fails_is_seen(
    run: Callable[[Path], int], tmp_path: Path, own: str, code: str, status: int, printed: str
) -> None:
    """In both kinds of processes."""
    (tmp_path / "page.py").write_text(own + code)
    assert run(tmp_path) == status
    assert printed in (tmp_path / "output.txt").read_text()


@pytest.mark.parametrize("page", [*PAGES, *API, "CHANGELOG.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


def public_names_of_ops() -> set[str]:
    """Functions, constants, and names imported as themselves, which is how a module says that it offers them."""
    found = set()
    for node in ast.parse((ROOT / "effformer" / "ops.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names if alias.name == alias.asname}
    return {name for name in found if not name.startswith("_")}


def public_errors() -> set[str]:
    """Errors defined in effformer that a docstring says are raised."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "effformer").rglob("*.py"))
    defined = re.findall(r"^class ([A-Z]\w*Error)\b", source, re.MULTILINE)
    return {name for name in defined if re.search(rf"^ +(?:\w+, )*{name}(?:, \w+)*: ", source, re.MULTILINE)}


def test_every_public_name_is_in_the_api() -> None:
    """`make docs` fails for a name that does not exist, and here one that is missing does."""
    pages = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in API)
    entries = re.findall(r"^::: effformer\.(.+)$", pages, re.MULTILINE)
    adapters = {"timm", "huggingface", "netspresso", "torchvision", "detectron2", "openmm"}
    assert {*effformer.__all__} - {"__version__"} | adapters <= {*entries}

    rows = re.findall(r"^\| \[`(.+?)`\]", pages, re.MULTILINE)
    assert {*entries} <= {*rows}  # in plain Markdown, too
    operations, errors = public_names_of_ops(), public_errors()
    assert {"meta4d", "fold_batch_norm", "UnsupportedError", "PIXEL_OFFSET"} <= operations
    assert {"AccelerationError", "CheckpointError", "ConfigError", "ExportError", "HubError"} <= errors
    constants = re.findall(r"`ops\.(\w+)`", pages)
    assert operations | errors <= {name.rpartition(".")[2] for name in rows} | {*constants}
