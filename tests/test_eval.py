"""`effformer eval`: its counts, compared with counts written out here."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from effformer.bench.measure.timing import Timing
from PIL import Image, ImageFilter

from effformer import EfficientFormer, create_model, set_backend
from effformer.apps.evaluate import Evaluation, Score, evaluate, find_labelled
from effformer.apps.images import Preprocessing, open_image, read_batches
from effformer.cli import main
from effformer.testing import randomise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # conftest.py lets Triton interpret on the latter
SMALL = Preprocessing(size=(32, 32))
SYNSETS = ("n01", "n02", "n03", "n04", "n05", "n06")


def draw(path: Path, seed: int) -> None:
    """A picture with structure at several scales, and a colour and size of its own."""
    generator = torch.Generator().manual_seed(seed)
    height, width = torch.randint(40, 70, (2,), generator=generator).tolist()
    colour = torch.rand(3, generator=generator)
    noise = (torch.rand(height, width, 3, generator=generator) * colour * 255).to(torch.uint8)
    image = Image.frombytes("RGB", (width, height), bytes(noise.flatten().tolist()))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.blend(image, image.filter(ImageFilter.GaussianBlur(5)), 0.6).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures in each of six class folders."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(18):
        draw(folder / SYNSETS[index // 3] / f"{index % 3}.jpg", index)
    return folder


def inputs(photos: Path) -> torch.Tensor:
    return torch.stack([SMALL(open_image(path)) for path in sorted(photos.rglob("*.*"))])


@torch.no_grad()
def spread_predictions(network: EfficientFormer, x: torch.Tensor) -> EfficientFormer:
    """Move the biases so that no class is likelier than another over x: drawn weights alone prefer one for all."""
    logits = network(x.to(network.head.weight.dtype))
    network.head.bias -= 2 * logits.mean(dim=0)  # the logits are the mean of two heads
    return network


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


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effformer.kernels.launch.INTERPRETED", False)


def count(logits: list[list[float]], targets: list[int]) -> tuple[int, int, list[int]]:
    """(right at the first place, within the first five, the first places)."""
    orders = [sorted(range(len(row)), key=lambda c, row=row: -row[c]) for row in logits]  # type: ignore[misc]
    pairs = list(zip(orders, targets, strict=True))
    return sum(o[0] == t for o, t in pairs), sum(t in o[:5] for o, t in pairs), [order[0] for order in orders]


@torch.no_grad()
def logits_of(network: EfficientFormer, backend: str, x: torch.Tensor, batch_size: int) -> list[list[float]]:
    weight = network.head.weight
    set_backend(network, backend)
    batches = x.to(weight.device, weight.dtype).to(memory_format=torch.channels_last).split(batch_size)
    return [row for batch in batches for row in network(batch).tolist()]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["eval", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# --- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_counts_are_those_of_a_plain_loop(
    narrow: Callable[..., EfficientFormer], photos: Path, dtype: torch.dtype
) -> None:
    network = spread_predictions(narrow(num_classes=6), inputs(photos)).to(DEVICE, dtype)
    images = find_labelled(photos, 6)
    result = evaluate(network, images, SMALL, batch_size=5)
    targets = [SYNSETS.index(path.parent.name) for path in sorted(photos.rglob("*.jpg"))]
    firsts = []
    for backend in ("eager", "triton"):
        top1, top5, first = count(logits_of(network, backend, inputs(photos), 5), targets)
        assert len(set(first)) > 2  # else the counts would say little
        assert 0 < top1 < top5 < 18
        score = getattr(result, backend)
        assert (score.top1, score.top5, score.nonfinite) == (top1 / 18, top5 / 18, 0)
        firsts.append(first)
    assert result.changed == sum(a != b for a, b in zip(*firsts, strict=True))
    assert (result.images, result.classes, result.failures, result.why_not_triton) == (18, 6, {}, None)
    assert result.timed_batch == 5
    assert result.eager.forward is not None
    assert result.eager.images_per_second == pytest.approx(5000 / result.eager.forward.p50)
    assert result.interpreted == (DEVICE == "cpu")
    assert (result.triton.images_per_second is None) == result.interpreted


def spoil(network: EfficientFormer, backend: str, change: Callable[[torch.Tensor, int], None]) -> None:
    """Let `change` write into the logits of each image, known by its place in the run, where `backend` computes."""
    seen = {"eager": 0, "triton": 0}
    block: Any = network.stages[0].blocks[0]

    def after(module: Any, args: Any, logits: torch.Tensor) -> None:
        for row in logits:
            if block.backend == backend:
                change(row, seen[backend] % 18)  # counting is over when it starts again, for timing
            seen[block.backend] += 1

    network.register_forward_hook(after)


def test_changed_predictions_are_counted(narrow: Callable[..., EfficientFormer], photos: Path) -> None:
    network = spread_predictions(narrow(num_classes=6, dtype=torch.float32), inputs(photos)).to(DEVICE)
    images = find_labelled(photos, 6)
    plain = logits_of(network, "eager", inputs(photos), 4)
    moved = [row[-1:] + row[:-1] if index in (0, 7, 17) else row for index, row in enumerate(plain)]

    def roll(row: torch.Tensor, index: int) -> None:
        if index in (0, 7, 17):
            row.copy_(row.roll(1))

    spoil(network, "triton", roll)
    result = evaluate(network, images, SMALL, batch_size=4)
    assert (result.changed, result.changed_share) == (3, 3 / 18)
    assert result.eager.top1 == count(plain, list(images.targets))[0] / 18
    assert result.triton.top1 == count(moved, list(images.targets))[0] / 18
    assert result.triton.top5 == count(moved, list(images.targets))[1] / 18
    assert "changed:  3 of 18 predictions (16.67%)" in str(result)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_wrong_and_counted(
    narrow: Callable[..., EfficientFormer], photos: Path, value: float
) -> None:
    """All images are recognised but for five: whose other class, own class, or every class is not finite."""
    network, images = narrow(num_classes=6, dtype=torch.float32).to(DEVICE), find_labelled(photos, 6)

    def recognise(row: torch.Tensor, index: int) -> None:
        row.zero_()
        row[images.targets[index]] = 1

    def fail(row: torch.Tensor, index: int) -> None:
        recognise(row, index)
        if index in (1, 2):  # of class 0: all NaN has its largest value there, says argmax
            row[:] = value
        if index in (6, 17):
            row[images.targets[index]] = value
        if index == 9:
            row[0] = value

    spoil(network, "eager", recognise)
    spoil(network, "triton", fail)
    result = evaluate(network, images, SMALL, batch_size=18)
    assert (result.eager.top1, result.eager.top5, result.eager.nonfinite) == (1, 1, 0)
    assert (result.triton.top1, result.triton.top5, result.triton.nonfinite) == (13 / 18, 13 / 18, 5)
    assert result.changed == 5


@pytest.mark.usefixtures("no_triton")
def test_of_equal_logits_the_lower_class_comes_first(narrow: Callable[..., EfficientFormer], photos: Path) -> None:
    network = narrow(num_classes=6, dtype=torch.float32)
    for head in (network.head, network.head_dist):
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    result = evaluate(network, find_labelled(photos, 6), SMALL)
    assert (result.eager.top1, result.eager.top5) == (3 / 18, 15 / 18)
    assert (result.triton, result.changed, result.changed_share) == (None, None, None)
    assert "Triton interprets only in a process started with TRITON_INTERPRET=1" in str(result)


@pytest.mark.usefixtures("no_triton")
def test_fewer_than_five_classes(narrow: Callable[..., EfficientFormer], photos: Path, tmp_path: Path) -> None:
    for name in SYNSETS[:3]:
        (tmp_path / name).symlink_to(photos / name)
    network = spread_predictions(narrow(num_classes=3, dtype=torch.float32), inputs(photos))
    images = find_labelled(tmp_path, 3)
    result = evaluate(network, images, SMALL)
    assert result.eager.top1 == count(logits_of(network, "eager", inputs(photos)[:9], 9), list(images.targets))[0] / 9
    assert 0 < result.eager.top1 < result.eager.top5 == 1
    assert "top-3        100.00%" in str(result)


def test_bfloat16_is_eager_alone_under_the_interpreter(narrow: Callable[..., EfficientFormer], photos: Path) -> None:
    result = evaluate(narrow(num_classes=6, dtype=torch.bfloat16), find_labelled(photos, 6).spread(2), SMALL)
    assert result.triton is None
    assert "bfloat16" in str(result.why_not_triton) or DEVICE == "cuda"


def test_evaluate_refuses(narrow: Callable[..., EfficientFormer], photos: Path) -> None:
    images = find_labelled(photos, 6)
    with pytest.raises(ValueError, match="training=True"):
        evaluate(narrow(num_classes=6).train(), images, SMALL)
    with pytest.raises(ValueError, match="got 0 classes"):
        evaluate(narrow(num_classes=0), images, SMALL)
    with pytest.raises(ValueError, match="got class 5, allowed are those below the network's 5"):
        evaluate(narrow(num_classes=5), images, SMALL)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_labels_are_the_folders_in_order(tmp_path: Path) -> None:
    for name in ("b/2.JPEG", "b/1.png", "a/below/x.webp", "c/z.jpg", "c/z.jpg.features.png", "c/list.csv", "readme"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_labelled(tmp_path, 3)
    names = ("a/below/x.webp", "b/1.png", "b/2.JPEG", "c/z.jpg")
    assert found.paths == tuple(tmp_path / name for name in names)
    assert found.targets == (0, 1, 1, 2)
    assert found.ignored == tuple(tmp_path / name for name in ("readme", "c/list.csv", "c/z.jpg.features.png"))
    listed = find_labelled(tmp_path, 5, ["c", "x", "a", "y", "b"])
    assert (listed.paths, listed.targets) == (found.paths, (2, 4, 4, 0))


@pytest.mark.parametrize(("limit", "taken"), [(1, [0]), (3, [0, 6, 12]), (4, [0, 4, 9, 13]), (99, list(range(18)))])
def test_a_limit_is_spread_over_the_classes(photos: Path, limit: int, taken: list[int]) -> None:
    images = find_labelled(photos, 6)
    some = images.spread(limit)
    assert some.paths == tuple(images.paths[index] for index in taken)
    assert some.targets == tuple(index // 3 for index in taken)
    assert len(set(some.targets)) == min(limit, 6)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_come_in_order_and_are_read_ahead(photos: Path, tmp_path: Path, workers: int) -> None:
    paths, log = list(find_labelled(photos, 6).paths), tmp_path / "opened"
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    paths.insert(5, broken)

    class Watched(Preprocessing):  # in other processes, hence the file
        def crop(self, image: Image.Image) -> Image.Image:
            with log.open("a") as file:
                file.write("x")
            return super().crop(image)

    def wait(done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not done() and time.monotonic() < deadline:
            time.sleep(0.01)

    wanted, seen = inputs(photos), []
    for indices, batch, failures in read_batches(paths, Watched((32, 32)), 4, workers):
        assert failures == ({5: "not an image"} if 4 in indices else {})
        assert torch.equal(batch, wanted[[index - (index > 5) for index in indices]])
        seen += indices
    assert seen == [index for index in range(19) if index != 5]
    log.unlink()
    batches = read_batches(paths, Watched((32, 32)), 4, workers)
    next(batches)
    ahead = 4 * (workers + 1) - 1  # each process is one batch ahead, and the broken image is not cropped
    wait(lambda: log.stat().st_size >= ahead)
    time.sleep(0.3)
    assert log.stat().st_size == ahead  # no further while nobody asks
    batches.close()
    wait(lambda: not multiprocessing.active_children())
    assert not multiprocessing.active_children()


# --- the command ------------------------------------------------------------------------------------------------------


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
            "got 3 class folders in {}, allowed are the network's 2 classes; with --c",
        ),
        (["a/1.jpg"], None, "got 1 class folders in {}, allowed are the network's 2 classes; with --classes"),
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
