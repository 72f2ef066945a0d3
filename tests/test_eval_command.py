"""`effformer eval` as a user calls it: its output, and its errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from effformer.bench.measure.timing import Timing
from labelled_photos import DEVICE, SMALL, SYNSETS, count, inputs, logits_of, spread_predictions

from effformer import EfficientFormer, create_model
from effformer.apps.evaluate import Evaluation, Score
from effformer.apps.images import Preprocessing, open_image
from effformer.cli import main
from effformer.testing import randomise


@pytest.fixture(scope="module")
def weights(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = randomise(create_model("efficientformer_l1", num_classes=6)).eval()
    path = tmp_path_factory.mktemp("weights") / "l1.safetensors"
    safetensors.torch.save_file(spread_predictions(network, inputs(photos)).state_dict(), path)
    return path


@pytest.fixture
def copy(photos: Path, tmp_path: Path) -> Path:
    """The pictures, to be spoilt."""
    return Path(shutil.copytree(photos, tmp_path / "copy"))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["eval", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_json(capsys: pytest.CaptureFixture[str], photos: Path, weights: Path) -> None:
    options = ("--size", "32", "--limit", "4", "--device", DEVICE, "--json")
    status, out, err = run(capsys, photos, "--checkpoint", weights, *options)
    facts = json.loads(out)
    assert status == 0
    assert "loaded:" in err
    assert "4/4" not in err  # the progress bar is for terminals

    network = create_model("efficientformer_l1", checkpoint=str(weights), num_classes=6).eval()
    top1, top5, _ = count(logits_of(network, "eager", inputs(photos)[[0, 4, 9, 13]], 4), [0, 1, 3, 4])
    for backend in ("eager", "triton"):
        assert (facts[backend]["top1"], facts[backend]["top5"]) == (top1 / 4, top5 / 4)
        assert facts[backend]["nonfinite"] == 0
    expected = {
        "model": "efficientformer_l1",
        "weights": str(weights),
        "dtype": "float32",
        "size": [32, 32],
        "folder": str(photos),
        "class_folders": 4,
        "images_found": 18,
        "ignored": [],
        "images": 4,
        "classes": 6,
        "failures": {},
        "why_not_triton": None,
        "interpreted": DEVICE == "cpu",
        "changed": 0,
        "changed_share": 0.0,
        "timed_batch": 4,
    }
    assert {key: facts[key] for key in expected} == expected
    others = {"device", "device_name", "versions", "timed", "eager", "triton"}
    assert facts.keys() == expected.keys() | others
    assert facts["eager"].keys() == {"top1", "top5", "nonfinite", "images_per_second", "forward"}
    assert facts["eager"]["forward"].keys() == {"p20", "p50", "p80", "p99", "repeats"}
    assert facts["eager"]["images_per_second"] == pytest.approx(4000 / facts["eager"]["forward"]["p50"])


@pytest.mark.usefixtures("no_triton")
def test_text_and_damaged_images(capsys: pytest.CaptureFixture[str], copy: Path, weights: Path) -> None:
    (copy / "n02" / "broken.jpg").write_bytes(b"no image at all")
    (copy / "n05" / "0.jpg").write_bytes((copy / "n05" / "0.jpg").read_bytes()[:300])
    (copy / "n05" / "notes.txt").touch()
    arguments = (copy, "--checkpoint", weights, "--size", "32", "--device", "cpu")
    status, out, err = run(capsys, *arguments)
    assert status == 1
    for name in ("n02/broken.jpg", "n05/0.jpg"):
        assert f"effformer: {copy / name}: " in err
    assert "2 of 19 images failed" in err

    network = create_model("efficientformer_l1", checkpoint=str(weights), num_classes=6).eval()
    good = [index for index in range(18) if index != 12]
    x = torch.stack([SMALL(open_image(copy / SYNSETS[index // 3] / f"{index % 3}.jpg")) for index in good])
    top1, top5, _ = count(logits_of(network, "eager", x, 17), [index // 3 for index in good])
    assert 0 < top1 < top5 < 17
    cells = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert (cells["top-1"], cells["top-5"]) == ([f"{top1 / 17:.2%}"], [f"{top5 / 17:.2%}"])
    for part in ("images:   17 of 19, from 6 class folders", "cpu (", "float32", "32x32, bicubic", "batch of 14: eager",
                 "ignored:  1 files", "triton:   not run: 'cpu' is not an NVIDIA GPU"):  # fmt: skip
        assert part in out
    status, out, _ = run(capsys, *arguments, "--json")
    facts = json.loads(out)
    assert status == 1
    assert facts["failures"].keys() == {str(copy / "n02/broken.jpg"), str(copy / "n05/0.jpg")}
    assert facts["ignored"] == [str(copy / "n05" / "notes.txt")]
    assert (facts["triton"], facts["changed"], facts["images"]) == (None, None, 17)
    assert "not an NVIDIA GPU" in facts["why_not_triton"]


@pytest.mark.usefixtures("no_triton")
def test_frozen(capsys: pytest.CaptureFixture[str], photos: Path, weights: Path) -> None:
    arguments = (photos, "--checkpoint", weights, "--size", "32", "--limit", "6", "--device", "cpu", "--frozen")
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert "frozen:   0 of 6 predictions changed (0.00%)" in out
    facts = json.loads(run(capsys, *arguments, "--json")[1])
    assert facts["frozen"]["top1"] == facts["eager"]["top1"]
    assert facts["frozen"].keys() == facts["eager"].keys()
    assert facts["changed_frozen"] == 0


@pytest.mark.usefixtures("no_triton")
def test_only_damaged_images(capsys: pytest.CaptureFixture[str], tmp_path: Path, weights: Path) -> None:
    (tmp_path / "n01").mkdir()
    (tmp_path / "n01" / "broken.jpg").touch()
    (tmp_path / "list").write_text("\n".join(SYNSETS))
    status, out, err = run(capsys, tmp_path, "--checkpoint", weights, "--classes", tmp_path / "list", "--device", "cpu")
    assert status == 1
    assert f"none of 1 images could be read\n  {tmp_path / 'n01' / 'broken.jpg'}: not an image" in err
    assert "top-1" not in out


@pytest.mark.usefixtures("no_triton")
def test_a_subset_of_the_classes_and_the_checkpoints_preprocessing(
    capsys: pytest.CaptureFixture[str], photos: Path, weights: Path, tmp_path: Path
) -> None:
    """Two folders that are the network's classes 4 and 1, prepared as config.json says."""
    (tmp_path / "val").mkdir()
    for name in ("n02", "n05"):
        (tmp_path / "val" / name).symlink_to(photos / name)
    names = ["x", "n05", "y", "z", "n02", "w"]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to(weights)
    config = {"input_size": [3, 40, 33], "mean": [0.1, 0.2, 0.3], "std": [0.3, 0.3, 0.3], "crop_pct": 0.8}
    (tmp_path / "model" / "config.json").write_text(json.dumps({"pretrained_cfg": config}))
    status, out, _ = run(capsys, tmp_path / "val", "--checkpoint", tmp_path / "model", "--classes",
                         tmp_path / "names.txt", "--device", "cpu", "--dtype", "bfloat16", "--json")  # fmt: skip
    assert status == 0
    facts = json.loads(out)
    network = create_model("efficientformer_l1", checkpoint=str(weights), num_classes=6).eval().bfloat16()
    preprocessing = Preprocessing((40, 33), (0.1, 0.2, 0.3), (0.3, 0.3, 0.3), "bicubic", 0.8)
    paths = [photos / name / f"{index}.jpg" for name in ("n02", "n05") for index in range(3)]
    x = torch.stack([preprocessing(open_image(path)) for path in paths])
    top1, top5, _ = count(logits_of(network, "eager", x, 6), [4, 4, 4, 1, 1, 1])
    assert (facts["eager"]["top1"], facts["eager"]["top5"]) == (top1 / 6, top5 / 6)
    assert (facts["size"], facts["class_folders"], facts["classes"], facts["dtype"]) == ([40, 33], 2, 6, "bfloat16")


@pytest.mark.parametrize(
    ("files", "classes", "message"),
    [
        ([], None, "DIR: {} holds no class folder"),
        (["readme"], None, "DIR: {} holds no class folder"),
        (
            ["a/1.jpg", "b/1.jpg", "c/1.jpg"],
            None,
            "got 3 class folders in {} (a, b, c), allowed are the network's 2 classes; with --c",
        ),
        (["a/1.jpg"], None, "got 1 class folders in {} (a), allowed are the network's 2 classes; with --classes"),
        (["a/1.jpg", "b/1.jpg", "1.png"], None, "DIR: got {}/1.png outside the class folders"),
        (["a/1.jpg", "b/1.csv"], None, "DIR: got no image in {}/b, allowed are class folders with images"),
        (["a/1.jpg"], "a\nb\nc\n", "--classes: got 3 names, allowed are the network's 2 classes"),
        (["a/1.jpg", "c/1.jpg"], "a\nb", "--classes: got no name for the folder c of {}"),
        (["a/1.jpg"], "a\na", "--classes: got a more than once"),
        (["a/1.jpg"], "a\n\n", "--classes: got an empty name for class 1"),
        (["a/1.jpg"], "\xe9", "--classes: LIST is not UTF-8 text"),
    ],
)
def test_errors_of_folders(
    capsys: pytest.CaptureFixture[str],
    narrow: Callable[..., EfficientFormer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: list[str],
    classes: str | None,
    message: str,
) -> None:
    monkeypatch.setattr(
        "effformer.commands.common.load_network", lambda *_: (narrow(num_classes=2), "narrow", {}, "weights")
    )
    folder, names = tmp_path / "images", tmp_path / "names"
    for file in ("", *files):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).touch() if file else folder.mkdir()
    names.write_bytes((classes or "").encode("latin-1"))
    status, _, err = run(capsys, folder, "--checkpoint", "weights", *(() if classes is None else ("--classes", names)))
    assert status == 1
    assert err.startswith("effformer: error: ")
    assert message.format(folder).replace("LIST", str(names)) in err


def test_errors_of_paths(capsys: pytest.CaptureFixture[str], photos: Path, weights: Path) -> None:
    picture = photos / "n01" / "0.jpg"
    for arguments, message in (
        ((photos / "nowhere", "--checkpoint", weights), f"DIR: {photos / 'nowhere'} is not a folder"),
        ((picture, "--checkpoint", weights), f"DIR: {picture} is not a folder"),
        ((photos, "--checkpoint", "nowhere.pth"), "nowhere.pth is not a file"),
        ((photos, "--checkpoint", weights, "--classes", photos / "no"), "No such file or directory"),
        ((photos, "--checkpoint", weights, "--device", "cuda:77"), "--device: got 'cuda:77', allowed are auto, cpu"),
    ):
        status, _, err = run(capsys, *arguments)
        assert status == 1
        assert message in err


@pytest.mark.parametrize("checkpoint", ["none", "auto"])
def test_random_weights_are_refused(capsys: pytest.CaptureFixture[str], photos: Path, checkpoint: str) -> None:
    status, _, err = run(capsys, photos, "--checkpoint", checkpoint)
    assert status == 1
    assert f"--checkpoint: got {checkpoint!r}, allowed are trained weights" in err


def test_a_checkpoint_of_one_head_is_refused(
    capsys: pytest.CaptureFixture[str], photos: Path, weights: Path, tmp_path: Path
) -> None:
    state = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({k: v for k, v in state.items() if "dist" not in k}, tmp_path / "one.safetensors")
    status, _, err = run(capsys, photos, "--checkpoint", tmp_path / "one.safetensors")
    assert status == 1
    assert "one.safetensors without classification heads, allowed is one with both" in err


@pytest.mark.parametrize("arguments", [["x"], ["x", "--checkpoint", "y", "--limit", "0"], ["--checkpoint", "y"]])
def test_wrong_calls_are_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["eval", *arguments])
    assert error.value.code == 2


def test_text_of_both_backends() -> None:
    timing = Timing(9.0, 10.0, 11.0, 12.0, 50)
    text = str(Evaluation(200, 10, {}, Score(0.5, 0.9, 0, 1600.0, timing), Score(0.495, 0.9, 1, 3200.0, timing),
                          None, False, 3, 16))  # fmt: skip
    for part in ("eager    triton", "50.00%    49.50%", "1600.0    3200.0", "3 of 200 predictions (1.50%)",
                 "ms a batch of 16: eager 10.00 (p20 9.00, p80 11.00, 50 repeats), triton 10.00"):  # fmt: skip
        assert part in text
