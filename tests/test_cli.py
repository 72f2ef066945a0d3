"""The command, as a user calls it, and what it reads and writes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from command_line import run
from PIL import Image
from safetensors import safe_open
from test_golden import checkpoint

from effformer import create_model
from effformer.apps.images import Preprocessing, open_image
from effformer.testing import randomise

pytestmark = pytest.mark.usefixtures("no_gpu")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "l1.safetensors"
    safetensors.torch.save_file(randomise(create_model("efficientformer_l1")).state_dict(), path)
    return path


def test_one_image(capsys: pytest.CaptureFixture[str], photo: Path, weights: Path) -> None:
    status, out, _ = run(capsys, "run", photo, "--checkpoint", weights, "--beside")
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
    status, out, _ = run(capsys, "run", photo, "--checkpoint", "none", "--beside")
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
    arguments = ("run", folder, "--checkpoint", weights, "--batch-size", 2, "--beside")
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
    run(capsys, "run", photo, "--checkpoint", weights, "--beside")
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
    status, out, _ = run(capsys, "run", photo, "--checkpoint", folder, "--beside")
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
    status, out, _ = run(capsys, "run", photo, "--checkpoint", path, "--size", "64x96", "--beside")
    assert status == 0
    assert "without a classification head" in out
    stage1 = safetensors.torch.load_file(f"{photo}.features.safetensors")["stage1"]
    norm = "norm0" if name.startswith("snap") else "encoder.norm0"
    weight, bias = (checkpoint(name)[f"{norm}.{part}"].float()[:, None, None] for part in ("weight", "bias"))
    assert abs(((stage1 - bias) / weight).std() - 1) < 1e-3  # GroupNorm's output


def test_an_interrupted_conversion_leaves_the_target(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: Path, content: bytes) -> int:
        path.open("wb").write(content[:100])
        raise KeyboardInterrupt

    target = tmp_path / "target.pth"
    target.write_bytes(b"as it was")
    monkeypatch.setattr(Path, "write_bytes", half)
    status, out, err = run(capsys, "convert", weights, target, "--force")
    assert (status, out, err) == (130, "", "effformer: interrupted; TARGET is as it was\n")
    assert target.read_bytes() == b"as it was"
    assert {path.name for path in tmp_path.iterdir()} == {target.name, weights.name}


def test_run_json(capsys: pytest.CaptureFixture[str], photo: Path, weights: Path) -> None:
    (photo.parent / "broken.jpg").write_bytes(b"")
    labels = photo.parent / "labels.txt"
    labels.write_text("\n".join(f"thing {index}" for index in range(1000)))
    call = ("run", photo.parent, "--checkpoint", weights, "--size", "64x32", "--labels", labels, "--beside")
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
