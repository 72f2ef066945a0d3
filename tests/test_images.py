"""Images: their preprocessing, the files that are found and read, and pictures of feature maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from effformer.apps.images import Preprocessing, find_images, open_image
from effformer.apps.pictures import draw_features

pytestmark = pytest.mark.usefixtures("no_gpu")


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
            r"size: got \(0, 224\) \(tuple\), allowed is a sequence of 2, each an integer of 32",
        ),
        ({"input_size": [3, 31, 224]}, r"size: got \(31, 224\) .* each an integer of 32 or more"),
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


def test_preprocessing_takes_lists_arrays_and_numpys_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    wanted = Preprocessing((64, 48), (0.5, 0.25, 0.5), (1, 2, 1))
    for sequence in (list, numpy.array, lambda values: tuple(numpy.array(values)), torch.tensor):
        given = Preprocessing(sequence([64, 48]), sequence([0.5, 0.25, 0.5]), sequence([1, 2, 1]))
        assert (given, repr(given)) == (wanted, repr(wanted))
    with pytest.raises(ValueError, match=r"size: got \(16, 16\) \(tuple\), allowed is .* of 32 or more"):
        Preprocessing((16, 16))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGBA", (40, 40)), r"image: got a PIL image of mode RGBA, allowed is RGB: image.convert\('RGB'\)"),
        (Image.new("L", (40, 40)), "image: got a PIL image of mode L, allowed is RGB"),
        ("photo.jpg", r"image: got str, allowed is a PIL image of mode RGB: Image.open\(path\).convert\('RGB'\)"),
        (torch.zeros(40, 40, 3), r"image: got Tensor, allowed is a PIL image of mode RGB: Image.fromarray"),
    ],
)
def test_only_rgb_images_are_prepared(image: Any, message: str) -> None:
    for call in (Preprocessing(), Preprocessing().crop, Preprocessing().normalise):
        with pytest.raises(TypeError, match=message):
            call(image)
    with pytest.raises(ValueError, match=r"image: got one of 40x30 \(height x width\), allowed is 224x224"):
        Preprocessing().normalise(Image.new("RGB", (30, 40)))


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
