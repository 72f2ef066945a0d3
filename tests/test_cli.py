"""The command, as a user calls it, and what it reads and writes."""

from __future__ import annotations

import json
import re
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
from effformer.cli import main
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


def test_a_folder_with_a_damaged_image(capsys: pytest.CaptureFixture[str], photo: Path, weights: Path) -> None:
    folder = photo.parent
    image = Image.open(photo)
    (folder / "below").mkdir()
    image.convert("L").save(folder / "below" / "grey.jpg")
    image.rotate(90, expand=True).save(folder / "tall.png")
    (folder / "broken.jpg").write_bytes(b"no image at all")
    (folder / "cut.png").write_bytes(photo.read_bytes()[:2000])
    (folder / "notes.txt").write_text("left alone")
    arguments = ("run", folder, "--checkpoint", weights, "--batch-size", 2)
    for _ in range(2):  # the second run must not take the first one's pictures for images
        status, out, err = run(capsys, *arguments)
        assert status == 1
        for name in ("broken.jpg", "cut.png"):
            assert f"effformer: {folder / name}: " in err
        assert "2 of 5 images failed" in err
        for name in ("photo.png", "tall.png", "below/grey.jpg"):
            assert str(folder / name) in out
            assert (folder / f"{name}.features.safetensors").exists()
            assert (folder / f"{name}.features.png").exists()
    assert "5/5" in err  # the progress bar

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
        (["PHOTO", "--checkpoint", "nowhere.pth"], "nowhere.pth is no file"),
        (["PHOTO", "--checkpoint", "PHOTO"], "no torch file of weights alone"),
        (["PHOTO", "--checkpoint", "none", "--device", "cuda:7"], "--device: got 'cuda:7', allowed are auto, cpu"),
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
    assert message in line or "no torch file" in message


@pytest.mark.parametrize("arguments", [["run"], ["run", "x", "--size", "0x5"], ["run", "x", "--batch-size", "-1"], []])
def test_wrong_calls_are_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


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
    assert facts["backends"]["cpu"] == "eager (\"auto\": 'cpu' is no NVIDIA GPU)"


def test_triton_without_gpu_and_interpreter(
    capsys: pytest.CaptureFixture[str], photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effformer.kernels.launch.INTERPRETED", False)
    status, _, err = run(capsys, "run", photo, "--checkpoint", "none", "--backend", "triton", "--device", "cpu")
    assert status == 1
    assert "backend='triton': 'cpu' is no NVIDIA GPU, and Triton interprets only" in err


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
        ({"input_size": [3, 0, 224]}, r"size: got \(0, 224\), allowed is two integers above 0"),
        ({"mean": [0.5]}, r"mean: got \(0.5,\), allowed is three finite numbers"),
        ({"mean": 0.5}, "mean: got 0.5"),
        ({"std": [0, 0, 0]}, r"std: got \(0, 0, 0\), allowed is three finite numbers above 0"),
        ({"crop_pct": None}, "crop_pct: got None, allowed is a number above 0, at most 1"),
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
