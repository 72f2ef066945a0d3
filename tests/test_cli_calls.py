"""Calls of the command: options, help, errors, interrupts, closed pipes."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from command_line import run
from small_networks import small

from effformer.checkpoints.formats import CheckpointError
from effformer.cli import _parser, main

pytestmark = pytest.mark.usefixtures("no_gpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/place"], "no such file or folder: /no/such/place"),
        (["EMPTY"], "no image below"),
        (["PHOTO", "--checkpoint", "nowhere.pth"], "nowhere.pth is not a file"),
        (["PHOTO", "--checkpoint", "PHOTO"], "is not a torch or safetensors file"),
        (["PHOTO", "--checkpoint", "none", "--device", "cuda:7"], "--device: got 'cuda:7', allowed are auto, cpu ("),
        (["PHOTO", "--checkpoint", "none", "--labels", "LABELS"], "--labels: got 1 lines"),
        (["PHOTO", "OTHER", "--checkpoint", "none", "--output", "OUT"], "would be written to the same file"),
    ],
)
def test_errors_are_one_line_and_status_1(
    capsys: pytest.CaptureFixture[str], photo: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "labels").write_text("one")
    other = tmp_path / "photo.png"
    other.write_bytes(photo.read_bytes())
    places = {
        "PHOTO": photo,
        "OTHER": other,
        "EMPTY": tmp_path / "empty",
        "OUT": tmp_path,
        "LABELS": tmp_path / "labels",
    }
    status, _, err = run(capsys, "run", *(places.get(argument, argument) for argument in arguments))
    assert status == 1
    assert message in err
    (line,) = (line for line in err.splitlines() if line.startswith("effformer: error:"))
    assert message in line


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("", "required: COMMAND"),
        ("run", "required: PATH"),
        ("run x --size 0x5", "--size: got '0x5', allowed is HxW, or one side, of 32 pixels or more"),
        ("run x --size 224x", "--size: got '224x', allowed is HxW, or one side, of 32 pixels or more"),
        ("run x --size 16", "--size: got '16', allowed is HxW, or one side, of 32 pixels or more"),
        *(
            (f"{call} --size 224x31", "--size: got '224x31'")
            for call in ("verify", "info", "eval x --checkpoint y", "export x.pt2 --checkpoint y", "bench run")
        ),
        ("run x --output y --beside", "--beside: not allowed with argument --output"),
        ("run x --batch-size -1", "--batch-size: got '-1', allowed is a whole number of 1 or more"),
        ("verify --seed x", "--seed: got 'x', allowed is a whole number of 0 or more"),
        ("run x --model l9", "--model: got 'l9', allowed are l1, l3, l7, efficientformer_l1,"),
        (
            "run x --dtype int8",
            "--dtype: got 'int8', allowed are float32, fp32, float, bfloat16, bf16, float16, fp16, half",
        ),
        ("run x --backend cuda", "--backend: got 'cuda', allowed are auto, eager, triton"),
        ("verify --op meta4d relu", "--op: got 'relu', allowed are pool_mixer, "),
        ("convert a b --to keras", "--to: got 'keras', allowed are effformer, timm, original, netspresso"),
        ("bench --minutes 0", "--minutes: got '0', allowed is a number of minutes above 0"),
        ("bench tune --minutes soon", "--minutes: got 'soon', allowed is a number of minutes above 0"),
    ],
)
def test_wrong_calls_are_status_2(call: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(call.split())
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "found"),
    [
        ("verify --model l3 efficientformer_l1", {"model": ["efficientformer_l3", "efficientformer_l1"]}),
        (
            "verify --op meta4d network --dtype half bf16",
            {"op": ["meta4d", "network"], "dtype": ["float16", "bfloat16"]},
        ),
        ("bench run --dtype fp32 --size 64 96x128", {"dtype": ["float32"], "size": [(64, 64), (96, 128)]}),
        ("bench kernels --op head meta4d --model l7", {"op": ["head", "meta4d"], "model": ["efficientformer_l7"]}),
        ("bench tune --dtype float --batch-size 4 1", {"dtype": ["float32"], "batch_size": [4, 1]}),
        ("bench run --minutes 90.5", {"minutes": 90.5}),
        ("export x.pt2 --checkpoint y --dtype bf16", {"dtype": "bfloat16", "format": None}),
    ],
)
def test_values_of_options(call: str, found: dict[str, Any]) -> None:
    assert vars(_parser().parse_args(call.split())).items() >= found.items()


def commands(parser: argparse.ArgumentParser | None = None, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every parser by its words, the groups among them."""
    parser = parser or _parser()
    yield names, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from commands(below, *names, name)


def test_help_and_version_need_neither_torch_nor_triton_nor_yaml() -> None:
    calls = [[*names, "--help"] for names, _ in commands()]
    assert len(calls) == 13
    code = (
        "import sys\nfrom effformer.cli import main\nfor call in eval(sys.argv[1]):\n"
        "    try:\n        main(call)\n    except SystemExit as error:\n        assert error.code == 0\n"
        "    assert not {'torch', 'triton', 'yaml', 'numpy'} & {*sys.modules}, call"
    )
    done = subprocess.run([sys.executable, "-c", code, repr([*calls, ["--version"]])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: effformer") == 13
    assert re.search(r"^effformer \d+\.\d+\.\d+$", done.stdout, re.MULTILINE)
    traced = [sys.executable, "-X", "importtime", "-m", "effformer.cli", "bench", "run", "--help"]
    imports = subprocess.run(traced, capture_output=True, text=True, check=True).stderr
    assert "effformer.commands.bench" in imports
    assert not re.search(r"\b(torch|triton|yaml)\b", imports)


def test_help_names_what_is_allowed() -> None:
    """These names live in modules that `--help` does not import."""
    allowed = {
        ("run", "backend"): ("backend", "BACKENDS"),
        ("convert", "to"): ("checkpoints.formats", "TARGETS"),
        ("export", "format"): ("serving.export", "FORMATS"),
        ("export", "output"): ("serving.packing", "OUTPUTS"),
        ("export", "backend"): ("serving.export", "BACKENDS"),
        ("verify", "op"): ("apps.verify", "CHECKED"),
    }
    texts = {
        (names[-1], action.dest): action.help for names, parser in commands() if names for action in parser._actions
    }
    for option, (module, names) in allowed.items():
        for name in getattr(importlib.import_module(f"effformer.{module}"), names):
            assert re.search(rf"\b{name}\b", texts[option]), (option, name)
    assert [option for option, text in texts.items() if not text] == [("bench", "==SUPPRESS==")]  # its COMMAND


def test_an_interrupt_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(arguments: object) -> int:
        raise KeyboardInterrupt

    for module, call, kept in (
        ("bench_kernels", "bench kernels", "finished measurements are kept, the same command goes on"),
        ("evaluate", "eval x --checkpoint y", "no file was written"),
        ("export", "export x.pt2 --checkpoint y", "TARGET is as it was"),
    ):
        monkeypatch.setattr(f"effformer.commands.{module}.main", interrupted)
        assert run(capsys, *call.split()) == (130, "", f"effformer: interrupted; {kept}\n")


def test_ctrl_c_between_images(photo: Path, tmp_path: Path) -> None:
    for index in range(60):
        (tmp_path / "many").mkdir(exist_ok=True)
        (tmp_path / "many" / f"{index:02}.png").symlink_to(photo)
    code = (
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nfrom effformer.cli import main\n"
    )
    call = [
        "run",
        str(tmp_path / "many"),
        "--checkpoint",
        "none",
        "--batch-size",
        "1",
        "--output",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}sys.exit(main(sys.argv[1:]))", *call], stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob("out/*.png")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "effformer: interrupted; the features of finished images are kept\n"
    assert 0 < len(list(tmp_path.glob("out/*.png"))) < 60


@pytest.mark.parametrize(("lines", "unbuffered"), [(0, ""), (1, ""), (100_000, ""), (1, "1")])
def test_a_closed_pipe_is_silence(lines: int, unbuffered: str) -> None:
    """`effformer ... | head`: the help, the end of a command, and the middle of one meet the closed pipe."""
    code = (
        "import sys\nfrom effformer import cli\n"
        "def long(arguments):\n    for _ in range(int(sys.argv[1])):\n        print('line')\n    return 0\n"
        "cli.info.main = long\nsys.exit(cli.main(['info'] if int(sys.argv[1]) else ['--help']))"
    )
    read, write = os.pipe()
    os.close(read)
    call, environment = [sys.executable, "-c", code, str(lines)], os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(call, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_faults_that_are_not_the_users(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another pipe than stdout's is an error like others; an error of torch keeps its traceback."""

    def fail(error: Exception) -> None:
        def main(arguments: object) -> int:
            raise error

        monkeypatch.setattr("effformer.commands.info.main", main)

    fail(BrokenPipeError("the worker is gone"))
    assert run(capsys, "info")[::2] == (1, "effformer: error: the worker is gone\n")
    fail(CheckpointError("no weights"))
    assert run(capsys, "info") == (1, "", "effformer: error: no weights\n")
    fail(RuntimeError("a shape of torch"))
    with pytest.raises(RuntimeError, match="a shape of torch"):
        main(["info"])


@pytest.mark.parametrize(
    ("built", "visible", "reason"),
    [
        (False, None, f"torch {torch.__version__} was built without CUDA"),
        (True, "", "torch finds no GPU; CUDA_VISIBLE_DEVICES is ''"),
        (True, None, "torch finds no GPU; nvidia-smi shows whether the driver does"),
    ],
)
def test_no_gpu_has_a_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, built: bool, visible: str | None, reason: str
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert run(capsys, "verify", "--device", "cuda")[::2] == (
        1,
        f"effformer: error: --device: got 'cuda', allowed are auto, cpu ({reason})\n",
    )


def test_triton_without_gpu_and_interpreter(
    capsys: pytest.CaptureFixture[str], photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effformer.kernels.launch.INTERPRETED", False)
    status, _, err = run(capsys, "run", photo, "--checkpoint", "none", "--backend", "triton", "--device", "cpu")
    assert status == 1
    assert "backend='triton': 'cpu' is not an NVIDIA GPU, and Triton interprets only" in err


def test_which_weights_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, target = tmp_path / "last.pth", tmp_path / "taken.safetensors"
    one, other = small(1, depths=(3, 2, 6, 4)).state_dict(), small(2, depths=(3, 2, 6, 4)).state_dict()
    torch.save({"model": one, "model_ema": other}, path)
    for which, expected in (["--which", "model"], one), ([], other):
        assert main(["convert", str(path), str(target), "--force", *which]) == 0
        assert torch.equal(safetensors.torch.load_file(target)["head.weight"], expected["head.weight"])
        assert "not taken: model" in capsys.readouterr().out
    assert main(["convert", str(path), str(target), "--force", "--which", "teacher"]) == 1
    assert "which: got 'teacher', allowed are 'model', 'model_ema'" in capsys.readouterr().err
    assert main(["run", str(path), "--checkpoint", "none", "--which", "model"]) == 1
    assert "--which: got 'model' with --checkpoint none" in capsys.readouterr().err
