"""Accuracy on a folder of labelled images, by plain PyTorch, the kernels and the frozen form (extra `image`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..backend import why_not_triton
from ..bench.measure.timing import Timing, measure
from ..model.network import EfficientFormer, set_backend
from ..serving.frozen import freeze
from ..testing import float32_as_such
from .batches import read_batches
from .images import Preprocessing, find_images, is_hidden, is_image

TIMED = "one forward of a batch that lies on the device, from an idle device to an idle one; float32 without TF32"
NOT_FINITE = -1


@dataclass(frozen=True)
class LabelledImages:
    """Images of DIR/class/, by class folder and then by path.

    Attributes:
        paths: the images.
        targets: the class of each, 0 for the network's first.
        ignored: files below DIR without an image's suffix, hidden ones, and those that `effformer run` wrote; of DIR,
            hidden folders, too.
    """

    paths: tuple[Path, ...]
    targets: tuple[int, ...]
    ignored: tuple[Path, ...] = ()

    def spread(self, limit: int) -> LabelledImages:
        """At most `limit` images, evenly spaced over all of them; the same ones every time."""
        total, count = len(self.paths), min(limit, len(self.paths))
        taken = [index * total // count for index in range(count)]
        paths = tuple(self.paths[index] for index in taken)
        return LabelledImages(paths, tuple(self.targets[index] for index in taken), self.ignored)


@dataclass(frozen=True)
class Score:
    """The result of one backend.

    Attributes:
        top1, top5: share of the images (0 to 1) whose class has the largest logit, or one of the five largest (all of
            them in a network of fewer classes). Of equal logits the lower class comes first.
        nonfinite: images with NaN or infinite logits; they count as wrong.
        images_per_second: from the median of `forward`; None under Triton's interpreter.
        forward: milliseconds of `TIMED`. None under the interpreter, which does not show a GPU's speed.
    """

    top1: float
    top5: float
    nonfinite: int
    images_per_second: float | None
    forward: Timing | None


@dataclass(frozen=True)
class Evaluation:
    """Eager PyTorch, Triton and, if asked for, the frozen form on the same images.

    Attributes:
        images: the number of readable ones; all shares refer to it.
        classes: of the network.
        failures: file -> why it could not be read.
        eager: score of `effformer.reference`.
        triton: score of the kernels, None where they cannot run.
        why_not_triton: why they cannot, None where they ran.
        interpreted: whether they ran in Triton's interpreter.
        changed: images whose likeliest class differs between Triton and eager, or whose logits are finite with only
            one of them; None without Triton.
        timed_batch: images in the batch that was timed.
        frozen: score of `effformer.freeze(network)`, None where it was not asked for.
        changed_frozen: as `changed`, between the frozen form and eager.
    """

    images: int
    classes: int
    failures: dict[Path, str]
    eager: Score
    triton: Score | None
    why_not_triton: str | None
    interpreted: bool
    changed: int | None
    timed_batch: int
    frozen: Score | None = None
    changed_frozen: int | None = None

    @property
    def changed_share(self) -> float | None:
        """`changed` as a share of the images, 0 to 1."""
        return None if self.changed is None else self.changed / self.images

    def __str__(self) -> str:
        forms = {"eager": self.eager, "triton": self.triton, "frozen": self.frozen}
        named = {name: score for name, score in forms.items() if score is not None}
        scores = list(named.values())
        rows = {
            "": list(named),
            "top-1": [f"{score.top1:.2%}" for score in scores],
            f"top-{min(5, self.classes)}": [f"{score.top5:.2%}" for score in scores],
            "NaN, inf": [str(score.nonfinite) for score in scores],
            "images/s": [f"{score.images_per_second:.1f}" if score.images_per_second else "-" for score in scores],
        }
        lines = [f"{title:<10}" + "".join(f"{cell:>10}" for cell in cells) for title, cells in rows.items()]
        if self.changed is None:
            lines.append(f"triton:   not run: {self.why_not_triton}")
        else:
            lines.append(f"changed:  {self.changed} of {self.images} predictions ({self.changed_share:.2%})")
        if self.changed_frozen is not None:
            share = self.changed_frozen / self.images
            lines.append(f"frozen:   {self.changed_frozen} of {self.images} predictions changed ({share:.2%})")
        if self.interpreted:
            lines.append("triton:   interpreted, so its speed is not measured")
        times = [
            f"{name} {forward.p50:.2f} (p20 {forward.p20:.2f}, p80 {forward.p80:.2f}, {forward.repeats} repeats)"
            for name, score in named.items()
            if (forward := score.forward)
        ]
        return "\n".join(
            [*lines, f"time:     ms a batch of {self.timed_batch}: {', '.join(times)}", f"          {TIMED}"]
        )


def find_labelled(folder: Path, num_classes: int, classes: Sequence[str] | None = None) -> LabelledImages:
    """The images of `folder`/class/, recursive in each class, without hidden folders and files.

    Args:
        folder: holds a folder for each class.
        num_classes: of the network, 1 or more.
        classes: folder names in the order of the network's classes; `folder` may lack some of them. Without it the
            folders, sorted by name, are the classes 0, 1, ... and must be as many.

    Raises:
        OSError: where `folder` is not one, or cannot be read.
        ValueError: for images beside the class folders, a class folder without images, no folder at all, a number of
            folders or names that differs from the classes, repeated or empty names, a folder without a name.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"DIR: {folder} is not a folder")
    entries = sorted(folder.iterdir(), key=lambda path: path.name)
    folders = {path.name: path for path in entries if path.is_dir() and not is_hidden(path.name)}
    loose = [path for path in entries if path.name not in folders]
    if outside := [path for path in loose if is_image(path) and not is_hidden(path.name)]:
        raise ValueError(f"DIR: got {_listed(outside)} outside the class folders, allowed are images in {folder}/class")
    if not folders:
        raise ValueError(f"DIR: {folder} holds no class folder, allowed is a folder for each class with its images")
    index_of = _class_indices(list(folders), num_classes, classes, folder)
    images = {name: find_images([path]) for name, path in folders.items()}
    if empty := [folders[name] for name, found in images.items() if not found]:
        raise ValueError(f"DIR: got no image in {_listed(empty)}, allowed are class folders with images")
    labelled = {path: index_of[name] for name, found in images.items() for path in found}
    below = [path for name in folders for path in sorted(folders[name].rglob("*")) if not path.is_dir()]
    ignored = tuple(path for path in loose + below if path not in labelled)
    return LabelledImages(tuple(labelled), tuple(labelled.values()), ignored)


def _class_indices(
    folders: Sequence[str], num_classes: int, classes: Sequence[str] | None, folder: Path
) -> dict[str, int]:
    if classes is None:
        if len(folders) != num_classes:
            raise ValueError(
                f"DIR: got {len(folders)} class folders in {folder} ({_listed(folders)}), "
                f"allowed are the network's {num_classes} classes; "
                "with --classes, the folder name of each, some may be absent"
            )
        return {name: index for index, name in enumerate(folders)}
    if len(classes) != num_classes:
        raise ValueError(f"--classes: got {len(classes)} names, allowed are the network's {num_classes} classes")
    index_of = {name: index for index, name in enumerate(classes)}
    if "" in index_of:
        raise ValueError(f"--classes: got an empty name for class {index_of['']}, allowed are names of folders")
    if twice := [name for index, name in enumerate(classes) if index_of[name] != index]:
        raise ValueError(f"--classes: got {_listed(twice)} more than once, allowed is a name for each class")
    if unknown := [name for name in folders if name not in index_of]:
        raise ValueError(
            f"--classes: got no name for the folder {_listed(unknown)} of {folder}, allowed is one for each"
        )
    return index_of


def _listed(items: Sequence[object]) -> str:
    rest = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(map(str, items[:3])) + rest


@torch.no_grad()
@float32_as_such()
def evaluate(
    network: EfficientFormer,
    images: LabelledImages,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 16,
    frozen: bool = False,
    progress: Callable[[int], object] = lambda count: None,
) -> Evaluation:
    """Count right predictions of `network` on `images`, with eager PyTorch and, where it can run, with Triton.

    All see the same batches, in the network's dtype and memory format and on its device; each image is read once.
    On a CPU, Triton needs a process started with TRITON_INTERPRET=1. float32 is computed without TF32.

    Args:
        network: with heads, in eval mode; its backend is "auto" afterwards.
        images: of `find_labelled`.
        preprocessing: the checkpoint's.
        batch_size: images in a forward.
        frozen: count those of `effformer.freeze(network)`, too, in the network's dtype.
        progress: called after each batch with its number of files.

    Raises:
        ValueError: for a network without heads or in training mode, or with too few classes for a target.
        OSError: where no image could be read, naming each.
    """
    if network.num_classes < 1 or network.training:
        raise ValueError(
            f"network: got {network.num_classes} classes, training={network.training}, allowed is one with "
            "classification heads in eval mode"
        )
    if (largest := max(images.targets, default=0)) >= network.num_classes:
        raise ValueError(f"images: got class {largest}, allowed are those below the network's {network.num_classes}")
    weight = network.stem.conv1.weight
    reason = why_not_triton(weight.device, weight.dtype, network.config.act, asked_for=True)
    forms = [name for name, there in (("eager", True), ("triton", reason is None), ("frozen", frozen)) if there]
    judged: dict[str, list[Tensor]] = {name: [] for name in forms}
    snapshot = freeze(network, weight.dtype) if frozen else None

    def forward_of(form: str) -> Callable[[Tensor], Tensor]:
        """The callable of a form, ready for calls."""
        if snapshot is not None and form == "frozen":
            return snapshot
        set_backend(network, form)
        return network

    targets = torch.tensor(images.targets, device=weight.device)
    failures: dict[Path, str] = {}
    timed = weight.new_empty(0)
    try:
        for indices, batch, unread in read_batches(images.paths, preprocessing, batch_size):
            failures |= {images.paths[index]: why for index, why in unread.items()}
            if batch is not None:
                x = batch.to(weight.device, weight.dtype, memory_format=torch.channels_last)
                timed = x if len(x) > len(timed) else timed
                for form, batches in judged.items():
                    batches.append(_judged(forward_of(form)(x), targets[indices]))
            progress(len(indices) + len(unread))
        count = len(images.paths) - len(failures)
        if not count:
            reasons = "".join(f"\n  {path}: {why}" for path, why in failures.items())
            raise OSError(f"none of {len(images.paths)} images could be read{reasons}")
        if reason is None:
            from ..kernels.launch import INTERPRETED
        interpreted = reason is None and INTERPRETED
        scores, changed = {}, {}
        for form, batches in judged.items():
            ahead, prediction = torch.cat(batches, dim=1)
            if form == "eager":
                expected = prediction
            changed[form] = int((prediction != expected).sum())
            top1, top5 = (int(((ahead >= 0) & (ahead < places)).sum()) / count for places in (1, 5))
            forward = None
            if form == "eager" or not interpreted:
                call = forward_of(form)
                forward = measure(partial(call, timed), weight.device)
            speed = None if forward is None else 1e3 * len(timed) / forward.p50
            scores[form] = Score(top1, top5, int((ahead < 0).sum()), speed, forward)
    finally:
        set_backend(network, "auto")
    return Evaluation(
        images=count,
        classes=network.num_classes,
        failures=failures,
        eager=scores["eager"],
        triton=scores.get("triton"),
        why_not_triton=reason,
        interpreted=interpreted,
        changed=changed.get("triton"),
        timed_batch=len(timed),
        frozen=scores.get("frozen"),
        changed_frozen=changed.get("frozen"),
    )


def _judged(logits: Tensor, targets: Tensor) -> Tensor:
    """[2, B] of logits [B, classes] and targets [B]: how many classes are ahead of the target, and the likeliest class.

    Both are `NOT_FINITE` where a logit is NaN or infinite.
    """
    of_target = logits.gather(1, targets[:, None])
    # Without topk: float16 has many equal logits, and topk's order among them differs between devices.
    lower = torch.arange(logits.shape[1], device=logits.device) < targets[:, None]
    ahead = ((logits > of_target) | ((logits == of_target) & lower)).sum(dim=1)
    judged = torch.stack([ahead, logits.argmax(dim=1)])  # argmax takes the first of equals, too
    return judged.where(logits.isfinite().all(dim=1), NOT_FINITE)
