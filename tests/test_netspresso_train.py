"""NetsPresso Trainer with our backbone, in one process and in two, by its own launchers.

The trainer cannot be installed beside the other extras: it asks for an older Pillow. Its launchers are quoted in
netspresso/trainer, around a stand-in for the rest. `make trainer` installs the real package into a folder of its own,
and the last test trains with it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from trainer_project import write_project

import effformer.netspresso

TESTS = Path(__file__).parent
EXAMPLE = TESTS.parent / "docs" / "examples" / "netspresso_train.py"
OURS, THEIRS = "effformer.model.netspresso", "netspresso_trainer.models.registry"
TRAIN = ("-m", "effformer.netspresso", "train")


def start(*arguments: str, path: Path = TESTS / "netspresso" / "trainer") -> subprocess.CompletedProcess[str]:
    folders = [str(path), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders)), "OMP_NUM_THREADS": "1"}
    # The trainer starts `python`, by that name.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((folder / "outputs" / "tiny").glob("*/rank*.json"))]


def test_the_page_shows_the_example_in_full() -> None:
    code = EXAMPLE.read_text(encoding="utf-8").rpartition('"""')[2]
    assert code.strip() in (TESTS.parent / "docs" / "netspresso.md").read_text(encoding="utf-8")


def test_two_processes_train_ours_together(tmp_path: Path) -> None:
    run = start(str(EXAMPLE), *write_project(tmp_path))  # `gpus: 0, 1` stands in environment.yaml
    assert run.returncode == 0, run.stderr
    first, second = results(tmp_path)
    assert first["backbone"] == second["backbone"] == OURS
    assert first["parameters"] == second["parameters"]  # after steps on different images: their gradients were shared


def test_two_processes_evaluate_ours_under_another_name(tmp_path: Path) -> None:
    options = write_project(tmp_path, "ours")
    run = start("-m", "effformer.netspresso", "evaluate", "--name", "ours", *options, "--gpus", "0,1")
    assert run.returncode == 0, run.stderr
    assert [result["backbone"] for result in results(tmp_path)] == [OURS, OURS]


def test_a_process_that_fails_is_no_success(tmp_path: Path) -> None:
    options = write_project(tmp_path)
    model = tmp_path / "model.yaml"
    model.write_text(model.read_text().replace("vit_num: 1", "vit_num: 9"))
    run = start(*TRAIN, *options, "--gpus", "1,0")
    assert run.returncode not in (0, -15)
    assert "params.vit_num: got 9" in run.stderr
    assert run.stderr.splitlines()[-1] == "python -m effformer.netspresso: train failed in a process of its own"
    assert results(tmp_path) == []


def test_one_gpu_needs_no_other_process(tmp_path: Path) -> None:
    run = start(*TRAIN, *write_project(tmp_path), "--gpus", "0")
    assert run.returncode == 0, run.stderr
    assert [result["backbone"] for result in results(tmp_path)] == [OURS]


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in in this process, not imported yet by anyone else."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "netspresso_trainer"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(TESTS / "netspresso" / "trainer")
    yield importlib.import_module("netspresso_trainer.trainer_main")
    for name in [name for name in sys.modules if name.partition(".")[0] == "netspresso_trainer"]:
        del sys.modules[name]


class Started:
    """In place of `subprocess.Popen`: keeps the command, ends at once."""

    def __init__(self, args: list[str]) -> None:
        self.args = args
        Started.commands.append(args)

    def wait(self) -> int:
        return 0


LAUNCH = dict.fromkeys(
    ["data", "augmentation", "model", "training", "logging", "environment", "log_level", "task", "model_name"], "x"
) | {"is_graphmodule_training": False, "logging_dir": Path("there")}


def test_the_launcher_passes_on_all_that_the_trainer_does(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Started, "commands", [], raising=False)
    monkeypatch.setattr(subprocess, "Popen", Started)
    trainer.run_distributed_training_script([2, 3], **LAUNCH)
    for name in ("efficientformer", "ours"):
        effformer.netspresso.register(name)
    trainer.run_distributed_training_script([2, 3], *LAUNCH.values())
    theirs, ours = Started.commands
    script = next(i for i, part in enumerate(theirs) if part.endswith("trainer_main.py"))
    options = theirs[script + 1 :]
    assert ours[-len(options) - 4 :] == [*options, "--name", "efficientformer", "--name", "ours"]
    assert ours[0] == sys.executable
    assert "--nproc-per-node=2" in ours


def test_a_backbone_that_was_taken_out_again_leaves_the_launcher_alone(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = importlib.import_module(THEIRS).MODEL_BACKBONE_DICT
    own = registry["efficientformer"]
    effformer.netspresso.register()
    registry["efficientformer"] = own
    monkeypatch.setattr(Started, "commands", [], raising=False)
    monkeypatch.setattr(subprocess, "Popen", Started)
    trainer.run_distributed_training_script([0, 1], **LAUNCH)
    (command,) = Started.commands
    assert "effformer.netspresso" not in command


def test_known_launchers_need_no_warning_and_unknown_ones_get_one(trainer: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        effformer.netspresso.register()

    def run_distributed_training_script(devices: list[int], config: str) -> None:
        """Of a version to come."""

    trainer.run_distributed_training_script = run_distributed_training_script
    with pytest.warns(UserWarning, match="they will build its own backbone; use one GPU"):
        effformer.netspresso.register()
    assert trainer.run_distributed_training_script is run_distributed_training_script


def test_ci_trains_with_the_real_trainer() -> None:
    """By a target that fails where the package is missing."""
    root = TESTS.parent
    command = ["make", "--no-print-directory", "--dry-run", "trainer"]
    recipe = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "EFFFORMER_TRAINER=1" in recipe[-2]
    name = test_the_real_trainer_trains_ours_in_two_processes.__name__
    assert recipe[-1].strip() == f"tests/test_netspresso_train.py::{name}"
    assert "make trainer" in (root / ".ci" / "run").read_text(encoding="utf-8").splitlines()


@pytest.mark.skipif(
    importlib.util.find_spec("netspresso_trainer") is None and "EFFFORMER_TRAINER" not in os.environ,
    reason="NetsPresso Trainer is not installed: see make trainer",
)
def test_the_real_trainer_trains_ours_in_two_processes(tmp_path: Path) -> None:
    run = start(*TRAIN, *write_project(tmp_path), "--gpus", "0,1", path=TESTS / "netspresso" / "on_cpu")
    assert run.returncode == 0, run.stderr
    folder = tmp_path / "outputs" / "tiny" / "version_0"
    assert json.loads((folder / "training_summary.json").read_text())["status"] == "success"
    state = load_file(folder / "classification_efficientformer_tiny_best.safetensors")
    assert {key.rpartition("network.")[0] for key in state if key.startswith("backbone")} == {"backbone."}
