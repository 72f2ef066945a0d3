"""Odd files among images: each is named and passed by. Hidden ones do not count. Text of other systems."""

from __future__ import annotations

import codecs
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from PIL import Image, ImageFile, ImageOps

from effformer.apps.batches import KILLED, read_batches
from effformer.apps.evaluate import find_labelled
from effformer.apps.images import Preprocessing, find_images, open_image
from effformer.commands.common import printable, read_lines, without_blank_end

pytestmark = pytest.mark.usefixtures("no_gpu")
SMALL = Preprocessing((32, 32))


def draw(path: Path, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 30, 90)).save(path)


def reason(path: Path) -> str:
    """Why it cannot be read, as a run reports it; after five seconds it is taken for a wait without end."""
    found: list[str] = []

    def read() -> None:
        (_, _, failures) = next(iter(read_batches([path], SMALL, 1)))
        found.extend(failures.values())

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive(), f"{path} blocks"
    assert "\n" not in found[0]
    return found[0]


# --- hidden -----------------------------------------------------------------------------------------------------------

HIDDEN = (
    ".a.png",
    "._a.png",
    ".ipynb_checkpoints/a-checkpoint.png",
    "__MACOSX/a.png",
    "__MACOSX/cat/._a.png",
    ".git/x.png",
    "@eaDir/a.png",
    "lost+found/a.png",
    "$RECYCLE.BIN/a.png",
    "System Volume Information/a.png",
)


def test_hidden_files_and_folders_do_not_count_unless_named(tmp_path: Path) -> None:
    for name in ("a.png", "b/a.png", *HIDDEN, *(f"b/{name}" for name in HIDDEN)):
        draw(tmp_path / name)
    assert find_images([tmp_path]) == [tmp_path / "a.png", tmp_path / "b/a.png"]
    assert find_images([tmp_path / "._a.png"]) == [tmp_path / "._a.png"]
    assert len(find_images([tmp_path / ".git"])) == 1


def test_hidden_files_and_folders_are_neither_labelled_images_nor_classes(tmp_path: Path) -> None:
    for name in ("cat/a.png", "dog/a.png", *HIDDEN, *(f"cat/{name}" for name in HIDDEN)):
        draw(tmp_path / name)
    found = find_labelled(tmp_path, 2)
    assert (found.paths, found.targets) == ((tmp_path / "cat/a.png", tmp_path / "dog/a.png"), (0, 1))
    hidden = {*(tmp_path / name for name in HIDDEN[:2]), *(tmp_path / f"cat/{name}" for name in HIDDEN)}
    folders = {tmp_path / name.split("/")[0] for name in HIDDEN if "/" in name}
    assert set(found.ignored) == hidden | folders


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    draw(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "photos" / "b").mkdir(parents=True)
    (tmp_path / "photos" / "b" / "up").symlink_to(tmp_path / "photos")
    for name in ("c", "d"):
        (tmp_path / "photos" / name).symlink_to(tmp_path / "elsewhere")
    assert find_images([tmp_path / "photos"]) == [tmp_path / "photos/c/a.png", tmp_path / "photos/d/a.png"]


# --- odd --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A folder with odd files: name -> a part of the reason why each cannot be read."""
    folder = tmp_path / "in"
    for name in ("a.png", "z.png"):
        draw(folder / name)
    os.rename(folder / "a.png", os.fsencode(folder) + b"/caf\xe9\n.png")  # latin-1, and two lines
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "nowhere.png").symlink_to("nothing")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "empty.jpg").touch()
    draw(folder / "cut.jpg", (300, 300))
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:700])
    bomb = b"P6 30000 30000 255\n"
    (folder / "bomb.ppm").write_bytes(bomb)
    with socket.socket(socket.AF_UNIX) as listener:
        place = os.getcwd()
        os.chdir(folder)  # a socket's path is short
        listener.bind("socket.png")
        os.chdir(place)
        yield {
            "pipe.png": "not a regular file", "device.png": "not a regular file", "socket.png": "not a regular file",
            "nowhere.png": "No such file", "circle.png": "Too many levels", "empty.jpg": "not an image",
            "cut.jpg": "truncated", "bomb.ppm": "DecompressionBombError",
        }  # fmt: skip


def test_odd_files_are_named_and_the_others_are_used(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, odd: dict[str, str]
) -> None:
    for name, part in odd.items():
        assert part in reason(tmp_path / "in" / name)
    call = ("run", tmp_path / "in", "--checkpoint", "none", "--size", "32", "--output", tmp_path / "out")
    status, out, err = run(capsys, *call)
    assert status == 1
    assert f"{len(odd)} of {len(odd) + 2} images failed" in err
    assert all(f"effformer: {tmp_path / 'in' / name}: " in err for name in odd)
    for name in (b"caf\xe9\n.png", b"z.png"):
        assert os.path.exists(os.fsencode(tmp_path) + b"/out/" + name + b".features.png")
    assert f"{tmp_path}/in/caf\\xe9\\n.png" in out
    status, out, _ = run(capsys, *call, "--json")
    facts = json.loads(out)
    assert {Path(path).name for path in facts["failures"]} == odd.keys()
    assert [os.fsencode(image["image"]) for image in facts["images"]] == [
        os.fsencode(tmp_path) + b"/in/" + name for name in (b"caf\xe9\n.png", b"z.png")
    ]


def test_a_terminal_of_ascii_shows_other_letters_as_escapes(tmp_path: Path) -> None:
    draw(tmp_path / "caf\xe9.png")
    call = [sys.executable, "-m", "effformer.cli", "run", tmp_path / "caf\xe9.png", "--checkpoint", "none"]
    done = subprocess.run(call, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert b"caf\\xe9.png" in done.stdout


def test_names_are_printed_in_one_line() -> None:
    assert printable("plain \xe9\u732b.png") == "plain \xe9\u732b.png"
    assert printable(os.fsdecode(b"caf\xe9\n\x1b[31m\r.png")) == "caf\\xe9\\n\\x1b[31m\\r.png"
    assert printable("\ud800\u202e") == "\\ud800\\u202e"


def test_an_image_that_does_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.png"):
        draw(tmp_path / name, (64, 64) if name == "a.png" else (40, 40))
    resize = Image.Image.resize

    def short(image: Image.Image, *arguments: object, **keywords: object) -> Image.Image:
        if image.width == 64:
            raise MemoryError
        return resize(image, *arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", short)
    ((indices, batch, failures),) = read_batches([tmp_path / "a.png", tmp_path / "b.png"], SMALL, 2)
    assert (indices, failures) == ([1], {0: "it does not fit into memory"})
    assert batch is not None
    assert batch.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("deadly", [("3.png",), ("0.png", "3.png", "5.png")])
def test_a_decoding_process_that_is_killed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, deadly: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        draw(tmp_path / f"{number}.png")
    read, own = Preprocessing.read, os.getpid()

    def killed(preprocessing: Preprocessing, path: Path) -> Image.Image:
        assert os.getpid() != own
        if path.name in deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(preprocessing, path)

    monkeypatch.setattr(Preprocessing, "read", killed)
    call = ("run", tmp_path, "--checkpoint", "none", "--size", "32", "--batch-size", "2")
    status, out, err = run(capsys, *call)
    assert status == 1
    assert [name in out for name in (f"{number}.png" for number in range(6))] == [
        f"{number}.png" not in deadly for number in range(6)
    ]
    assert all(f"{tmp_path / name}: {KILLED}\n" in err for name in deadly)
    assert f"{len(deadly)} of 6 images failed" in err


# --- large ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(65000, 1), (1, 65000)])
def test_a_strip_needs_little_memory(tmp_path: Path, size: tuple[int, int]) -> None:
    draw(tmp_path / "strip.png", size)
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom effformer.apps.images import Preprocessing\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "colours = Preprocessing().read(Path(sys.argv[1])).getcolors()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\nassert colours == [(224 * 224, (200, 30, 90))]"
    )
    limit = 8 << 30

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    call = [sys.executable, "-c", code, tmp_path / "strip.png"]
    done = subprocess.run(call, capture_output=True, text=True, preexec_fn=limited)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 30_000  # kilobytes; the resized strip would take 13 GB


@pytest.mark.parametrize("shape", [(20, 900), (900, 20), (33, 2000)])
def test_the_crop_of_a_strip_is_that_of_the_resized_strip(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    height, width = shape
    down, across = torch.linspace(0, 6, height)[:, None], torch.linspace(0, 40, width)[None]
    pixels = torch.stack([((down + i).sin() * (across * (i + 1)).cos() + 1) * 127 for i in range(3)], dim=2).to(
        torch.uint8
    )
    image = Image.frombytes("RGB", (width, height), bytes(pixels.flatten().tolist()))
    found = Preprocessing((64, 64)).normalise(Preprocessing((64, 64)).crop(image))
    monkeypatch.setattr("effformer.apps.images.WIDEST", 1e9)
    whole = Preprocessing((64, 64)).normalise(Preprocessing((64, 64)).crop(image))
    assert (found - whole).abs().max() < 2.5 / 255 / 0.224
    assert found.std() > 0.2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_large_jpeg_is_reduced_while_it_is_decoded(
    tmp_path: Path, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn.datasets import load_sample_image

    tiles = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    large = Image.new("RGB", (3839, 2135))  # halves of the sides are no whole numbers
    for place in range(30):
        large.paste(tiles[place % 2], (640 * (place % 6), 427 * (place // 6)))
    exif = large.getexif()
    exif[0x0112] = orientation
    large.save(tmp_path / "large.jpg", quality=92, exif=exif)
    prepare = Preprocessing()
    decoded: list[tuple[int, int]] = []
    load = ImageFile.ImageFile.load

    def noted(image: ImageFile.ImageFile) -> Any:
        if image.tile:
            decoded.append(image.size)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", noted)
    whole = prepare.normalise(prepare.crop(open_image(tmp_path / "large.jpg")))
    assert decoded == [(3839, 2135)]
    error = (prepare.normalise(prepare.read(tmp_path / "large.jpg")) - whole).abs() * 255 * 0.226
    assert decoded[1:] == [(1920, 1068)]
    assert error.mean() < 0.5
    assert error.max() < 12
    draw(tmp_path / "usual.jpg", (1879, 1879))
    prepare.read(tmp_path / "usual.jpg")
    assert decoded[2:] == [(1879, 1879)]  # less than 8 * 235


@pytest.mark.parametrize(("mode", "orientation"), [("L", 1), ("P", 3), ("RGBA", 1), ("LA", 6), ("1", 1), ("RGB", 7)])
def test_an_image_of_another_mode_is_reduced_before_it_is_copied(
    tmp_path: Path, mode: str, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn.datasets import load_sample_image

    large = Image.fromarray(load_sample_image("china.jpg")).convert(mode)
    exif = large.getexif()
    exif[0x0112] = orientation
    large.save(tmp_path / "large.png", exif=exif)
    prepare, sizes = Preprocessing((64, 48)), []
    whole = prepare.normalise(prepare.crop(open_image(tmp_path / "large.png")))

    def noted(original: Any) -> Any:
        def call(image: Image.Image, *arguments: Any, **keywords: Any) -> Any:
            sizes.append(image.size)
            return original(image, *arguments, **keywords)

        return call

    monkeypatch.setattr(Image.Image, "convert", noted(Image.Image.convert))
    monkeypatch.setattr(ImageOps, "exif_transpose", noted(ImageOps.exif_transpose))
    monkeypatch.setattr("effformer.apps.images.REDUCING_GAP", 2)  # 2 * 67 pixels: a third of 640 x 427
    monkeypatch.setattr("effformer.apps.images._STRIP", 16)
    error = (prepare.normalise(prepare.read(tmp_path / "large.png")) - whole).abs() * 255 * 0.226
    assert 214 * 143 <= max(width * height for width, height in sizes) < 640 * 427 / 8
    assert error.mean() < 4
    assert error.max() < 40


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [(b"", "utf-8"), (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
     (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be")],
)  # fmt: skip
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_of_classes_of_any_editor(tmp_path: Path, mark: bytes, encoding: str, end: str) -> None:
    path = tmp_path / "classes.txt"
    for last in ("", end):
        path.write_bytes(mark + (f"caf\xe9{end}dog\x85\u2028{end}fox" + last).encode(encoding))
        assert read_lines("--classes", path) == ["caf\xe9", "dog\x85\u2028", "fox"]


def test_lists_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    for content, message in (
        ("cat\ndog".encode("utf-16-le"), "holds NUL, as UTF-16 without a byte order mark does: save it as UTF-8"),
        (b"caf\xe9", "is not UTF-8 text"),
        (codecs.BOM_UTF16_LE + b"a", "is not UTF-16 text"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"--classes: .*{message}"):
            read_lines("--classes", path)


def test_blank_lines_at_the_end_do_not_count(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert without_blank_end(["a", "b", "", " "], 2) == ["a", "b"]
    assert without_blank_end(["a", "", ""], 2) == ["a", ""]
    assert without_blank_end(["a", "", "b", "c"], 2) == ["a", "", "b", "c"]
    draw(tmp_path / "a.png")
    (tmp_path / "names.txt").write_bytes(codecs.BOM_UTF8 + b"thing\r\n" * 1000 + b"\r\n \r\n")
    call = ("run", tmp_path / "a.png", "--checkpoint", "none", "--size", "32", "--labels", tmp_path / "names.txt")
    assert run(capsys, *call)[0] == 0
    (tmp_path / "names.txt").write_bytes(b"thing\r\n" * 1001)
    assert "--labels: got 1001 lines, allowed are the network's 1000 classes" in run(capsys, *call)[2]
