"""Where `effformer run` writes, and the pictures that it draws."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from command_line import run
from PIL import Image

from effformer import create_model
from effformer.apps.pictures import LABEL_HEIGHT, draw_features
from effformer.testing import randomise

pytestmark = pytest.mark.usefixtures("no_gpu")
NONE = ("--checkpoint", "none", "--size", "32")


@pytest.fixture
def tree(photo: Path) -> Path:
    """photos/photo.png, and two class folders with a file of the same name."""
    for name in ("cat", "dog"):
        (photo.parent / name).mkdir()
        shutil.copy(photo, photo.parent / name / "1.png")
    return photo.parent


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_without_an_option_nothing_is_written(capsys: pytest.CaptureFixture[str], tree: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    status, out, _ = run(capsys, "run", tree, *NONE)
    assert status == 0
    assert out.count("pooled norm") == 3
    status, out, _ = run(capsys, "run", tree / "photo.png", *NONE)
    assert "written" not in out
    assert files(tmp_path) == before


def test_the_tree_of_a_folder_is_mirrored(capsys: pytest.CaptureFixture[str], tree: Path, tmp_path: Path) -> None:
    before, out = files(tree), tmp_path / "new" / "out"
    assert run(capsys, "run", tree, *NONE, "--output", out)[0] == 0
    images = ("photo.png", "cat/1.png", "dog/1.png")
    assert files(out) == {f"{name}.features.{kind}" for name in images for kind in ("png", "safetensors")}
    assert files(tree) == before


def test_several_arguments_have_places_of_their_own(
    capsys: pytest.CaptureFixture[str], tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree / "dog")
    assert (
        run(
            capsys,
            "run",
            tree / "cat",
            ".",
            tree / "cat/1.png",
            tree / "photo.png",
            *NONE,
            "--output",
            tmp_path / "out",
        )[0]
        == 0
    )
    assert {name for name in files(tmp_path / "out") if name.endswith(".png")} == {
        "cat/1.png.features.png", "dog/1.png.features.png", "photo.png.features.png"
    }  # fmt: skip
    shutil.copytree(tree / "cat", tmp_path / "other" / "cat")
    status, _, err = run(capsys, "run", tree / "cat", tmp_path / "other" / "cat", *NONE, "--output", tmp_path / "two")
    assert status == 1
    assert "would be written to the same file" in err
    assert not (tmp_path / "two").exists()


def test_an_output_that_is_a_file(capsys: pytest.CaptureFixture[str], photo: Path, tmp_path: Path) -> None:
    status, _, err = run(capsys, "run", photo, *NONE, "--output", photo)
    assert status == 1
    assert f"--output: got {photo}, which is a file; allowed is a folder" in err


def test_beside_each_image(capsys: pytest.CaptureFixture[str], tree: Path) -> None:
    assert run(capsys, "run", tree, *NONE, "--beside")[0] == 0
    assert (tree / "cat" / "1.png.features.png").exists()
    assert (tree / "photo.png.features.safetensors").exists()


def test_the_likeliest_class_is_on_the_picture(
    capsys: pytest.CaptureFixture[str], photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(randomise(create_model("efficientformer_l1", num_classes=7)).state_dict(), tmp_path / "weights.pth")
    (tmp_path / "names").write_text("\n".join(f"thing {index}" for index in range(7)))
    drawn: list[str | None] = []

    def draw(image: Image.Image, maps: list[torch.Tensor], label: str | None = None) -> Image.Image:
        drawn.append(label)
        return draw_features(image, maps, label)

    monkeypatch.setattr("effformer.apps.extract.draw_features", draw)
    call = ("run", photo, "--checkpoint", tmp_path / "weights.pth", "--output", tmp_path / "out")
    run(capsys, *call, "--labels", tmp_path / "names")
    run(capsys, *call)
    logits = safetensors.torch.load_file(tmp_path / "out" / "photo.png.features.safetensors")["logits"]
    index, share = int(logits.argmax()), float(logits.softmax(dim=0).max())
    assert drawn == [f"class {index}: thing {index}  {share:.1%}", f"class {index}  {share:.1%}"]
    assert Image.open(tmp_path / "out" / "photo.png.features.png").size == (5 * 228 - 4, 224 + 18 + LABEL_HEIGHT)
    run(capsys, "run", photo, *NONE, "--output", tmp_path / "out")
    assert drawn[2:] == [None]


@pytest.mark.parametrize("size", [(224, 224), (512, 32), (32, 320)])
def test_titles_and_labels_are_not_cut_off(size: tuple[int, int]) -> None:
    height, width = size
    image, maps = Image.new("RGB", (width, height)), [torch.rand(1000, 8, 8) for _ in range(4)]
    for label in ("short", "a very long label of a class " * 40, "\u732b \xfcbergro\xdf " * 90):
        picture = draw_features(image, maps, label)
        strip = (
            picture.crop((0, picture.height - LABEL_HEIGHT, *picture.size))
            .convert("L")
            .point(lambda v: 255 * (v < 128))
        )
        left, top, right, bottom = strip.getbbox() or (0, 0, 0, 0)
        assert 0 < left < right < picture.width
        assert 0 < top < bottom < LABEL_HEIGHT
        assert bottom - top > 10
    side = max(224, height)
    step = (picture.width + 4) // 5
    titles = picture.crop((0, 0, picture.width, 18)).convert("L").point(lambda v: 255 * (v < 128))
    for place in range(5):
        left, _, right, _ = titles.crop((step * place, 0, step * (place + 1), 18)).getbbox() or (0, 0, 0, 0)
        assert 0 < left < right < step - 4  # white between titles
    assert step >= round(width * side / height) + 4
