"""The command, as a user calls it, and what it reads and writes."""

from __future__ import annotations

import argparse
import importlib
import json
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
from PIL import Image, ImageFilter
from safetensors import safe_open
from test_golden import checkpoint

from effformer import create_model
from effformer.apps.images import Preprocessing, draw_features, find_images, open_image
from effformer.checkpoints.formats import CheckpointError
from effformer.cli import _parser, main
from effformer.testing import randomise


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests stay on the CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture with structure at every scale, 300x400."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (300, 400, 3), generator=generator, dtype=torch.uint8)
    image = Image.frombytes("RGB", (400, 300), bytes(noise.flatten().tolist()))
    image = Image.blend(image, image.filter(ImageFilter.GaussianBlur(9)), 0.7)
    path = tmp_path / "photos" / "photo.png"
    path.parent.mkdir()
    image.save(path)
    return path


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "l1.safetensors"
    safetensors.torch.save_file(randomise(create_model("efficientformer_l1")).state_dict(), path)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_one_image(capsys: pytest.CaptureFixture[str], photo: Path, weights: Path) -> None:
    status, out, _ = run(capsys, "run", photo, "--checkpoint", weights)
    assert status == 0
    for part in ("48x56x56", "96x28x28", "224x14x14", "448x7x7", "pooled:   448", "top 5:", "ms an image", "eager"):
        assert part in out

    network = create_model("efficientformer_l1", checkpoint=str(weights)).eval()
    with torch.no_grad():
        x = Preprocessing()(open_image(photo))[None]
        tokens, maps = network.forward_intermediates(x)
        pooled, logits = network.forward_head(tokens, pre_logits=True), network.forward_head(tokens)
    with safe_open(f"{photo}.features.safetensors", "pt") as file:
        assert file.metadata()["weights"] == str(weights)
        written = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert written.keys() == {"stage1", "stage2", "stage3", "stage4", "pooled", "logits"}
    for index, feature in enumerate(maps, 1):
        assert torch.allclose(written[f"stage{index}"], feature[0], rtol=0, atol=1e-4)
        mean, std = map(float, re.search(rf"stage {index}: .*mean (\S+)  std (\S+)", out).groups())
        assert abs(mean - feature.mean()) < 1e-4
        assert abs(std - feature.std()) < 1e-4
    assert torch.allclose(written["pooled"], pooled[0], rtol=0, atol=1e-4)
    assert torch.allclose(written["logits"], logits[0], rtol=0, atol=1e-4)
    assert abs(float(re.search(r"pooled: .*norm (\S+)", out)[1]) - pooled.norm()) < 1e-3
    assert f"class {logits.argmax()}\n" in out.partition("top 1:")[2]

    picture = Image.open(f"{photo}.features.png").convert("RGB")
    assert picture.width > 5 * 224
    panels = [picture.crop((228 * i, 18, 228 * i + 224, 242)) for i in range(5)]
    assert panels[0].tobytes() == Preprocessing().crop(open_image(photo)).tobytes()
    assert all(len(panel.getcolors(1 << 16) or []) > 20 for panel in panels)


def test_random_weights_say_so_and_give_no_top5(capsys: pytest.CaptureFixture[str], photo: Path) -> None:
    status, out, _ = run(capsys, "run", photo, "--checkpoint", "none")
    assert status == 0
    assert "random (seed 0)" in out
    assert "top 1" not in out
    assert "logits" not in safetensors.torch.load_file(f"{photo}.features.safetensors")


def test_auto_goes_on_without_the_hub_and_pretrained_does_not(
    capsys: pytest.CaptureFixture[str], photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    status, out, _ = run(capsys, "run", photo)
    assert status == 0
    assert "no trained weights" in out
    status, _, err = run(capsys, "run", photo, "--checkpoint", "pretrained")
    assert status == 1
    assert "effformer: error:" in err


def test_a_folder_with_a_damaged_image(
    capsys: pytest.CaptureFixture[str], photo: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photo.parent
    image = Image.open(photo)
    (folder / "below").mkdir()
    image.convert("L").save(folder / "below" / "grey.jpg")
    image.rotate(90, expand=True).save(folder / "tall.png")
    (folder / "broken.jpg").write_bytes(b"no image at all")
    (folder / "cut.png").write_bytes(photo.read_bytes()[:2000])
    (folder / "notes.txt").write_text("left alone")
    arguments = ("run", folder, "--checkpoint", weights, "--batch-size", 2)
    for terminal in (False, True):  # the second run must not take the first one's pictures for images
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        status, out, err = run(capsys, *arguments)
        assert status == 1
        for name in ("broken.jpg", "cut.png"):
            assert f"effformer: {folder / name}: " in err
        assert "2 of 5 images failed" in err
        for name in ("photo.png", "tall.png", "below/grey.jpg"):
            assert str(folder / name) in out
            assert (folder / f"{name}.features.safetensors").exists()
            assert (folder / f"{name}.features.png").exists()
        assert ("5/5" in err) == terminal  # the progress bar

    alone = safetensors.torch.load_file(f"{photo}.features.safetensors")
    run(capsys, "run", photo, "--checkpoint", weights)
    for key, value in safetensors.torch.load_file(f"{photo}.features.safetensors").items():
        assert torch.allclose(alone[key], value, rtol=0, atol=1e-4)


def test_many_images_are_decoded_ahead(capsys: pytest.CaptureFixture[str], photo: Path, tmp_path: Path) -> None:
    image = Image.open(photo).resize((64, 64))
    for index in range(33):
        image.rotate(index).save(photo.parent / f"{index}.png")
    (photo.parent / "broken.png").write_bytes(b"")
    out_folder = tmp_path / "out"
    status, _, err = run(capsys, "run", photo.parent, "--checkpoint", "none", "--size", "32", "--output", out_folder)
    assert status == 1
    assert "1 of 35 images failed" in err
    assert len(list(out_folder.glob("*.safetensors"))) == 34


def test_what_cannot_be_written_is_reported_and_the_rest_goes_on(
    capsys: pytest.CaptureFixture[str], photo: Path, tmp_path: Path
) -> None:
    Image.open(photo).save(photo.parent / "second.png")
    (tmp_path / "out" / "photo.png.features.safetensors").mkdir(parents=True)  # in the way
    status, out, err = run(capsys, "run", photo.parent, "--checkpoint", "none", "--output", tmp_path / "out")
    assert status == 1
    assert f"effformer: {photo}: " in err
    assert "cannot be written" in err
    assert str(photo.parent / "second.png") in out
    assert (tmp_path / "out" / "second.png.features.safetensors").exists()


def test_the_checkpoint_says_which_model_it_is(capsys: pytest.CaptureFixture[str], photo: Path, tmp_path: Path) -> None:
    state = randomise(create_model("efficientformer_l3")).half().state_dict()
    single = tmp_path / "l3.pth"
    torch.save({key: value for key, value in state.items() if not key.startswith("head_dist")}, single)
    status, out, _ = run(capsys, "run", photo, "--checkpoint", single)
    assert status == 0
    for part in ("efficientformer_l3", "ignored: head.weight, head.bias", "cast: float16 -> float32", "512x7x7"):
        assert part in out
    status, _, err = run(capsys, "run", photo, "--checkpoint", single, "--model", "efficientformer_l1")
    assert status == 1
    assert "--model: got efficientformer_l1, allowed is efficientformer_l3" in err


def test_a_converted_dense_checkpoint_is_not_taken_for_another_network(
    capsys: pytest.CaptureFixture[str], photo: Path, tmp_path: Path
) -> None:
    torch.save(checkpoint("netspresso_l1_segmentation_256x320"), tmp_path / "dense.pth")
    assert run(capsys, "convert", tmp_path / "dense.pth", tmp_path / "ours.pth", "--to", "effformer")[0] == 0
    status, _, err = run(capsys, "run", photo, "--checkpoint", tmp_path / "ours.pth")
    assert status == 1
    assert "tapped or inline" in err


def test_only_damaged_images(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(b"")
    status, out, err = run(capsys, "run", path, "--checkpoint", "none")
    assert status == 1
    assert f"effformer: {path}: not an image" in err
    assert "time:" not in out


def test_output_folder_size_dtype_and_labels(
    capsys: pytest.CaptureFixture[str], photo: Path, weights: Path, tmp_path: Path
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(f"thing {index}" for index in range(1000)))
    options = ("--size", "96x160", "--dtype", "bfloat16", "--labels", labels, "--output", tmp_path / "out")
    status, out, _ = run(capsys, "run", photo, "--checkpoint", weights, *options)
    assert status == 0
    assert "448x3x5" in out
    assert "%  thing " in out
    features = safetensors.torch.load_file(tmp_path / "out" / "photo.png.features.safetensors")
    assert features["stage1"].shape == (48, 24, 40)
    assert features["stage1"].dtype == torch.float32
    assert not list(photo.parent.glob("*.features.*"))


def test_a_checkpoint_brings_its_preprocessing(
    capsys: pytest.CaptureFixture[str], photo: Path, weights: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    weights.rename(folder / "model.safetensors")
    config = {"input_size": [3, 96, 96], "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "crop_pct": 0.8}
    config["interpolation"] = "bilinear"
    (folder / "config.json").write_text(json.dumps({"architecture": "efficientformer_l1", "pretrained_cfg": config}))
    status, out, _ = run(capsys, "run", photo, "--checkpoint", folder)
    assert status == 0
    assert "96x96, bilinear, centre crop 0.8" in out
    network = create_model("efficientformer_l1", checkpoint=str(folder)).eval()
    preprocessing = Preprocessing((96, 96), (0.1, 0.2, 0.3), (1, 1, 1), "bilinear", 0.8)
    with torch.no_grad():
        logits = network(preprocessing(open_image(photo))[None])[0]
    written = safetensors.torch.load_file(f"{photo}.features.safetensors")["logits"]
    assert torch.allclose(written, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["snap_l1_dense_256x320", "netspresso_l1_segmentation_256x320"])
def test_dense_checkpoints_run_as_their_code_would(
    capsys: pytest.CaptureFixture[str], photo: Path, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "dense.safetensors"
    safetensors.torch.save_file({key: value.float() for key, value in checkpoint(name).items()}, path)
    status, out, _ = run(capsys, "run", photo, "--checkpoint", path, "--size", "64x96")
    assert status == 0
    assert "without a classification head" in out
    stage1 = safetensors.torch.load_file(f"{photo}.features.safetensors")["stage1"]
    norm = "norm0" if name.startswith("snap") else "encoder.norm0"
    weight, bias = (checkpoint(name)[f"{norm}.{part}"].float()[:, None, None] for part in ("weight", "bias"))
    assert abs(((stage1 - bias) / weight).std() - 1) < 1e-3  # GroupNorm's output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/place"], "no such file or folder: /no/such/place"),
        (["EMPTY"], "no image below"),
        (["PHOTO", "--checkpoint", "nowhere.pth"], "nowhere.pth is not a file"),
        (["PHOTO", "--checkpoint", "PHOTO"], "not a torch file of weights alone"),
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
    assert message in line or "not a torch file" in message


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("", "required: COMMAND"),
        ("run", "required: PATH"),
        ("run x --size 0x5", "--size: got '0x5', allowed is HxW, or one side, of 32 pixels or more"),
        ("run x --size 16", "--size: got '16', allowed is HxW, or one side, of 32 pixels or more"),
        ("verify --size 224x31", "--size: got '224x31'"),
        ("run x --batch-size -1", "--batch-size: got '-1', allowed is a whole number of 1 or more"),
        ("verify --seed x", "--seed: got 'x', allowed is a whole number of 0 or more"),
        ("run x --model l9", "--model: got 'l9', allowed are l1, l3, l7, efficientformer_l1,"),
        (
            "run x --dtype int8",
            "--dtype: got 'int8', allowed are float32, fp32, float, bfloat16, bf16, float16, fp16, half",
        ),
        ("run x --backend cuda", "--backend: got 'cuda', allowed are auto, eager, triton"),
        ("verify --op meta4d relu", "--op: got 'relu', allowed are pool_mixer, "),
        ("convert a b --to keras", "--to: got 'keras', allowed are effformer, timm, original"),
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
    assert len(calls) == 12
    code = (
        "import sys\nfrom effformer.cli import main\nfor call in eval(sys.argv[1]):\n"
        "    try:\n        main(call)\n    except SystemExit as error:\n        assert error.code == 0\n"
        "    assert not {'torch', 'triton', 'yaml', 'numpy'} & {*sys.modules}, call"
    )
    done = subprocess.run([sys.executable, "-c", code, repr([*calls, ["--version"]])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: effformer") == 12
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
        ("evaluate", "eval x --checkpoint y", "nothing was written"),
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


def test_an_interrupted_conversion_leaves_the_target(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    target = tmp_path / "target.pth"
    target.write_bytes(b"as it was")
    monkeypatch.setattr(torch, "save", half)
    status, out, err = run(capsys, "convert", weights, target, "--force")
    assert (status, out, err) == (130, "", "effformer: interrupted; TARGET is as it was\n")
    assert target.read_bytes() == b"as it was"
    assert {path.name for path in tmp_path.iterdir()} == {target.name, weights.name}


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


def test_run_json(capsys: pytest.CaptureFixture[str], photo: Path, weights: Path) -> None:
    (photo.parent / "broken.jpg").write_bytes(b"")
    labels = photo.parent / "labels.txt"
    labels.write_text("\n".join(f"thing {index}" for index in range(1000)))
    call = ("run", photo.parent, "--checkpoint", weights, "--size", "64x32", "--labels", labels)
    status, out, err = run(capsys, *call, "--json")
    facts = json.loads(out)
    assert status == 1
    assert f"loaded:   {weights}" in err
    assert (facts["model"], facts["weights"], facts["size"]) == ("efficientformer_l1", str(weights), [64, 32])
    assert facts["failures"].keys() == {str(photo.parent / "broken.jpg")}
    assert (facts["device"], facts["dtype"], facts["batch_size"]) == ("cpu", "float32", 2)
    assert facts["forward_ms_per_image"] > 0
    (image,) = facts["images"]
    assert image["image"] == str(photo)
    assert image["written"] == [f"{photo}.features.safetensors", f"{photo}.features.png"]
    assert image["maps"] == [[48, 16, 8], [96, 8, 4], [224, 4, 2], [448, 2, 1]]
    written = safetensors.torch.load_file(image["written"][0])
    assert abs(image["pooled_norm"] - written["pooled"].norm()) < 1e-3
    probabilities, classes = written["logits"].softmax(dim=0).topk(5)
    assert [entry["class"] for entry in image["top5"]] == classes.tolist()
    assert [entry["name"] for entry in image["top5"]] == [f"thing {index}" for index in classes.tolist()]
    assert [entry["probability"] for entry in image["top5"]] == pytest.approx(probabilities.tolist())

    state = safetensors.torch.load_file(weights)
    state["stem.conv1.weight"][:] = torch.nan
    safetensors.torch.save_file(state, weights)
    (image,) = json.loads(run(capsys, *call, "--json")[1])["images"]  # JSON knows no NaN
    assert image["pooled_norm"] is None
    assert [entry["probability"] for entry in image["top5"]] == [None] * 5


def test_info(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    status, out, _ = run(capsys, "info")
    assert status == 0
    assert "tuned" not in out
    tuned = tmp_path / "effformer" / "configurations.json"
    tuned.parent.mkdir()
    tuned.touch()
    for part in ("12.29 M", "31.41 M", "82.23 M", "1.29 G", "448x7x7", torch.__version__, "device cpu", "eager"):
        assert part in out
    status, out, _ = run(capsys, "info", "--size", "512x640", "--json")
    facts = json.loads(out)
    assert facts["size"] == [512, 640]
    assert facts["tuned_configurations"] == str(tuned)
    assert facts["models"][0]["features"][-1] == [448, 16, 20]
    assert facts["models"][0]["parameters"] == 12_289_928
    assert facts["backends"]["cpu"] == "eager (\"auto\": 'cpu' is not an NVIDIA GPU)"


def test_triton_without_gpu_and_interpreter(
    capsys: pytest.CaptureFixture[str], photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effformer.kernels.launch.INTERPRETED", False)
    status, _, err = run(capsys, "run", photo, "--checkpoint", "none", "--backend", "triton", "--device", "cpu")
    assert status == 1
    assert "backend='triton': 'cpu' is not an NVIDIA GPU, and Triton interprets only" in err


def test_macs_are_those_of_the_layers() -> None:
    from effformer.apps.info import summarise

    network, counted = create_model("efficientformer_l3").eval(), 0

    def count(module: Any, args: Any, out: torch.Tensor) -> None:
        nonlocal counted
        counted += out[0].numel() * module.weight[0].numel()

    for module in network.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(1, 3, 96, 160))
    tokens, heads, key, value = 15, 8, 32, 128
    counted += 4 * heads * tokens**2 * (key + value)
    assert summarise("efficientformer_l3", 96, 160).macs == counted


def test_convert(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    state = {key: value.float() for key, value in checkpoint("snap_l1_classification_224").items()}
    source, timms, back = tmp_path / "original.pth", tmp_path / "timm.safetensors", tmp_path / "back.pth"
    torch.save({"model": state}, source)
    status, out, _ = run(capsys, "convert", source, timms)
    assert status == 0
    assert "(original) ->" in out
    create_model("efficientformer_l1").load_state_dict(safetensors.torch.load_file(timms), strict=True)
    status, _, err = run(capsys, "convert", source, tmp_path / "no" / "such" / "folder.safetensors")
    assert status == 1
    assert "cannot be written" in err
    assert run(capsys, "convert", source, tmp_path / "no" / "such" / "folder.pth")[0] == 1
    assert run(capsys, "convert", timms, back, "--to", "original")[0] == 0
    returned = torch.load(back, weights_only=True)
    assert all(torch.equal(returned[key], value) for key, value in state.items())

    status, _, err = run(capsys, "convert", source, timms)
    assert status == 1
    assert "--force replaces it" in err
    assert run(capsys, "convert", source, timms, "--force")[0] == 0
    status, _, err = run(capsys, "convert", source, tmp_path / "x.onnx")
    assert status == 1
    assert "allowed are *.safetensors" in err
    torch.save(checkpoint("snap_l1_dense_256x320"), tmp_path / "dense.pth")
    status, _, err = run(capsys, "convert", tmp_path / "dense.pth", tmp_path / "y.pth")
    assert status == 1
    assert "no feature norms" in err
    assert not (tmp_path / "y.pth").exists()
    status, out, _ = run(capsys, "convert", tmp_path / "dense.pth", tmp_path / "y.pth", "--to", "effformer")
    assert "left out: network.6.4.token_mixer.attention_biases" in out
    status, out, _ = run(capsys, "convert", tmp_path / "dense.pth", tmp_path / "z.pth", "--to", "effformer", "--json")
    facts = json.loads(out)
    assert (status, facts["format"], facts["to"]) == (0, "original-dense", "effformer")
    assert (facts["source"], facts["target"]) == (str(tmp_path / "dense.pth"), str(tmp_path / "z.pth"))
    assert facts["tensors"] == len(torch.load(facts["target"], weights_only=True))
    assert "network.6.4.token_mixer.attention_biases" in facts["left_out"]


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(224, 224), (160, 224)])
@pytest.mark.parametrize("shape", [(400, 300), (300, 400), (235, 235), (90, 1000)])
def test_preprocessing_is_timms(timm: Any, size: tuple[int, int], shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (*shape, 3), generator=generator, dtype=torch.uint8)
    image = Image.frombytes("RGB", (shape[1], shape[0]), bytes(pixels.flatten().tolist()))
    from timm.data import create_transform

    want = create_transform(
        (3, *size),
        interpolation="bicubic",
        crop_pct=0.95,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )(image)
    assert torch.allclose(Preprocessing(size)(image), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"interpolation": "random"}, "interpolation: got 'random'"),
        ({"input_size": 224}, "input_size: got 224"),
        (
            {"input_size": [3, 0, 224]},
            r"size: got \(0, 224\) \(tuple\), allowed is a sequence of 2, each an integer of 1",
        ),
        ({"mean": [0.5]}, r"mean: got \(0.5,\) \(tuple\), allowed is a sequence of 3, each a finite number"),
        ({"mean": 0.5}, "mean: got 0.5"),
        ({"std": [0, 0, 0]}, r"std: got \(0, 0, 0\) \(tuple\), allowed is a sequence of 3, each a number above"),
        ({"crop_pct": None}, r"crop_pct: got None \(NoneType\), allowed is a number above 0, at most 1"),
        ({"crop_pct": 0}, "crop_pct: got 0"),
        ({"input_size": [1, 224, 224]}, r"input_size: got \[1, 224, 224\]"),
        ({"crop_mode": "squash"}, "crop_mode: got 'squash'"),
    ],
)
def test_preprocessing_refuses(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_config({"pretrained_cfg": config})


def test_images_are_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # taken with the camera turned: the left side is up
    image.save(tmp_path / "turned.png", exif=exif)
    upright = open_image(tmp_path / "turned.png")
    assert upright.size == (20, 40)
    assert (upright.getpixel((10, 5)), upright.getpixel((10, 35))) == ((255, 0, 0), (0, 0, 255))


def test_modes_of_images(tmp_path: Path) -> None:
    ramp = bytes(range(256))
    for mode in ("L", "P", "LA", "RGBA", "CMYK", "1"):
        Image.frombytes("L", (16, 16), ramp).convert(mode if mode != "CMYK" else "RGB").convert(mode).save(
            tmp_path / "image.tif"
        )
        assert open_image(tmp_path / "image.tif").mode == "RGB"
    deep = Image.frombytes("I;16", (16, 16), b"".join((257 * value).to_bytes(2, "little") for value in range(256)))
    for name in ("deep.png", "deep.tif"):
        deep.save(tmp_path / name)
        assert open_image(tmp_path / name).getchannel("R").tobytes() == ramp
    for mode in ("I", "F"):
        Image.new(mode, (4, 4), 1).save(tmp_path / "wide.tif")
        with pytest.raises(OSError, match=f"mode {mode}"):
            open_image(tmp_path / "wide.tif")


def test_a_decoder_that_fails_in_its_own_way_is_a_failure_of_that_file(
    photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Invalid image grid")

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(OSError, match="RuntimeError: Invalid image grid"):
        open_image(photo)


def test_find_images_keeps_what_was_named(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.png", "a.png.features.png", "c.txt"):
        (tmp_path / name).touch()
    named = tmp_path / "c.txt"
    assert find_images([named, tmp_path, named]) == [named, tmp_path / "a.png", tmp_path / "b.jpg"]


def test_pictures_of_tiny_and_constant_maps() -> None:
    image = Image.new("RGB", (32, 32))
    maps = [torch.zeros(48, 8, 8), torch.randn(2, 4, 4), torch.randn(5, 1, 1), torch.full((4, 2, 2), torch.nan)]
    assert draw_features(image, maps).size[1] == 224 + 18
