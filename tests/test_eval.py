"""`effformer eval`: its counts, compared with counts written out, and the folders that it reads."""

from __future__ import annotations

import multiprocessing
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from labelled_photos import DEVICE, SMALL, SYNSETS, count, inputs, logits_of, spread_predictions
from PIL import Image

from effformer import EfficientFormer, freeze
from effformer.apps.batches import read_batches
from effformer.apps.evaluate import evaluate, find_labelled
from effformer.apps.images import Preprocessing

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


@pytest.mark.usefixtures("no_triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_frozen_form_is_counted_if_asked_for(
    narrow: Callable[..., EfficientFormer], photos: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = spread_predictions(narrow(num_classes=6, dtype=torch.float32), inputs(photos)).to("cpu", dtype)
    images = find_labelled(photos, 6)
    result = evaluate(network, images, SMALL, batch_size=4, frozen=True)
    batches = inputs(photos).to(dtype).split(4)
    rows = [row for batch in batches for row in freeze(network, dtype)(batch).tolist()]
    top1, top5, firsts = count(rows, list(images.targets))
    assert result.frozen is not None
    assert (result.frozen.top1, result.frozen.top5, result.frozen.nonfinite) == (top1 / 18, top5 / 18, 0)
    assert result.frozen.forward is not None
    *_, eagers = count(logits_of(network, "eager", inputs(photos), 4), list(images.targets))
    assert result.changed_frozen == sum(a != b for a, b in zip(firsts, eagers, strict=True))

    def rolled(network: EfficientFormer, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: network(x).roll(1, dims=1)

    monkeypatch.setattr("effformer.apps.evaluate.freeze", rolled)
    result = evaluate(network, images, SMALL, batch_size=4, frozen=True)
    assert (result.changed, result.changed_frozen) == (None, 18)
    assert "frozen:   18 of 18 predictions changed (100.00%)" in str(result)
    assert re.search(r"^ +eager +frozen$", str(result), re.MULTILINE)
    plain = evaluate(network, images.spread(2), SMALL)
    assert (plain.frozen, plain.changed_frozen) == (None, None)
    assert "frozen" not in str(plain)


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
