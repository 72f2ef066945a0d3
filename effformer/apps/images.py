"""Images in, pictures of feature maps out (extra `image`)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..checks import FINITE, POSITIVE, POSITIVE_INT, Rule, check, is_number, one_of
from ..config import PUBLISHED_INPUT

if TYPE_CHECKING:
    from PIL import Image

# `effformer run` writes these; they must not be inputs of the next run.
PICTURE_SUFFIX = ".features.png"

IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"
)  # fmt: skip
WORKERS = min(8, os.cpu_count() or 1)  # processes that decode


def _each(rule: Rule, count: int) -> Rule:
    return Rule(
        f"a sequence of {count}, each {rule.allowed}",
        lambda values: isinstance(values, Sequence) and len(values) == count and all(map(rule.holds, values)),
    )


_RULES = {
    "size": _each(POSITIVE_INT, 2),
    "mean": _each(FINITE, 3),
    "std": _each(POSITIVE, 3),
    "interpolation": one_of(("nearest", "bilinear", "bicubic", "lanczos")),
    "crop_pct": Rule("a number above 0, at most 1", lambda value: is_number(value) and 0 < value <= 1),
}


@dataclass(frozen=True)
class Preprocessing:
    """Turns an image into a network's input; the defaults are those of the published ImageNet weights.

    Attributes:
        size: (height, width) of the input.
        mean, std: of the training images, for each channel, after scaling to 0..1.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos".
        crop_pct: share of the resized image's side that the centre crop keeps.

    Raises:
        ValueError: naming the field that is wrong.
    """

    size: tuple[int, int] = PUBLISHED_INPUT["size"]
    mean: tuple[float, float, float] = PUBLISHED_INPUT["mean"]
    std: tuple[float, float, float] = PUBLISHED_INPUT["std"]
    interpolation: str = PUBLISHED_INPUT["interpolation"]
    crop_pct: float = PUBLISHED_INPUT["crop_pct"]

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            check(name, getattr(self, name), rule)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocessing:
        """From timm's `config.json` (its `pretrained_cfg`); absent fields keep their defaults.

        Raises:
            ValueError: naming the field: a wrong value, an unknown interpolation or crop, an input that is not RGB.
        """
        said = config.get("pretrained_cfg", config)
        if not isinstance(said, Mapping):
            raise ValueError(f"pretrained_cfg: got {said!r}, allowed is an object")
        if said.get("crop_mode", "center") != "center":
            raise ValueError(f"crop_mode: got {said['crop_mode']!r}, allowed is 'center'")
        fields: dict[str, Any] = {key: said[key] for key in _RULES.keys() & said.keys() - {"size"}}
        if "input_size" in said:
            size = said["input_size"]
            if not isinstance(size, Sequence) or len(size) != 3 or size[0] != 3:
                raise ValueError(f"input_size: got {size!r}, allowed is [3, height, width]")
            fields["size"] = tuple(size[1:])
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        return cls(**fields)

    def crop(self, image: Image.Image) -> Image.Image:
        """An RGB image, resized and cropped around its centre to `size`, as timm's evaluation does."""
        from PIL.Image import Resampling

        height, width = self.size
        target = [math.floor(side / self.crop_pct) for side in (height, width)]
        ratio = min(image.height / target[0], image.width / target[1])
        resized = (round(image.width / ratio), round(image.height / ratio))
        image = image.resize(resized, Resampling[self.interpolation.upper()])
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))

    def normalise(self, image: Image.Image) -> Tensor:
        """An RGB image of `size` as a network's input, float32 [3, H, W]."""
        return self._batch(image.tobytes())[0]

    def _batch(self, *crops: bytes) -> Tensor:
        """Crops' RGB pixels as a network's input, float32 [B, 3, H, W]."""
        pixels = torch.frombuffer(bytearray().join(crops), dtype=torch.uint8).view(len(crops), *self.size, 3)
        images = pixels.permute(0, 3, 1, 2).float() / 255
        return (images - images.new_tensor(self.mean)[:, None, None]) / images.new_tensor(self.std)[:, None, None]

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB image as a network's input, float32 [3, H, W]."""
        return self.normalise(self.crop(image))


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Files as they are; of folders, all files below them with an image's suffix, sorted, without our own pictures.

    Raises:
        FileNotFoundError: for a path that does not exist.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            below = (file for file in sorted(path.rglob("*")) if not file.name.endswith(PICTURE_SUFFIX))
            found |= {file: None for file in below if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()}
        elif path.exists():
            found[path] = None
        else:
            raise FileNotFoundError(f"no such file or folder: {path}")
    return list(found)


def open_image(path: Path) -> Image.Image:
    """The image in a file (its first frame), upright, as RGB; 16-bit grey is scaled to 8 bits.

    Raises:
        OSError: where it cannot be read, is damaged, or has 32-bit pixels, whose range is not defined.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16"):
                image = image.point(lambda value: value * (1 / 257)).convert("L")
            if image.mode in ("I", "F"):
                raise OSError(f"32-bit pixels (mode {image.mode}) have no defined range")
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise OSError("not an image") from None
    except OSError:
        raise
    except Exception as error:  # decoders raise many types on damaged files
        raise OSError(f"{type(error).__name__}: {error}") from error


def _crops(preprocessing: Preprocessing, paths: Iterable[Path]) -> list[bytes | str]:
    """The pixels of each image's crop, RGB after RGB; for an image that cannot be read, the reason."""
    crops: list[bytes | str] = []
    for path in paths:
        try:
            crops.append(preprocessing.crop(open_image(path)).tobytes())
        except OSError as error:
            crops.append(str(error))
    return crops


def read_batches(
    paths: Sequence[Path], preprocessing: Preprocessing, batch_size: int, workers: int = WORKERS
) -> Iterator[tuple[list[int], Tensor | None, dict[int, str]]]:
    """Images as a network's input, decoded by `workers` processes, each one batch ahead of the caller.

    Yields:
        for each `batch_size` paths, in their order: (indices of the images that could be read, batch [B, 3, H, W] or
        None if none could, index -> reason of those that could not).
    """
    starts = range(0, len(paths), batch_size)
    workers = min(workers, len(starts)) if len(starts) > 1 else 0  # one batch takes no longer than starting a process
    # Bytes go through a pipe. Tensors would need shared memory, of which containers have little.
    batches: Iterable[list[bytes | str]] = DataLoader(
        paths,  # type: ignore[arg-type]  # a sequence will do
        batch_size,
        num_workers=workers,
        prefetch_factor=1 if workers else None,
        collate_fn=partial(_crops, preprocessing),
    )
    for start, items in zip(starts, batches, strict=True):
        crops = {start + offset: item for offset, item in enumerate(items) if isinstance(item, bytes)}
        failures = {start + offset: item for offset, item in enumerate(items) if isinstance(item, str)}
        yield list(crops), preprocessing._batch(*crops.values()) if crops else None, failures


def draw_features(image: Image.Image, maps: Sequence[Tensor]) -> Image.Image:
    """The input and each stage's map [C, h, w] in a row: the map's three principal components as red, green, blue."""
    from PIL import Image, ImageDraw

    side, margin = max(224, image.height), 18
    width = round(image.width * side / image.height)
    panels = [(f"input {image.height}x{image.width}", image)]
    panels += [(f"stage {i}: {m.shape[0]}x{m.shape[1]}x{m.shape[2]}", _principal(m)) for i, m in enumerate(maps, 1)]
    picture = Image.new("RGB", (len(panels) * (width + 4) - 4, side + margin), "white")
    draw = ImageDraw.Draw(picture)
    for position, (title, panel) in enumerate(panels):
        left = position * (width + 4)
        picture.paste(panel.resize((width, side), Image.Resampling.NEAREST), (left, margin))
        draw.text((left + 2, 3), title, fill="black")
    return picture


def _principal(feature: Tensor) -> Image.Image:
    from PIL import Image

    height, width = feature.shape[1:]
    pixels = feature.detach().cpu().double().flatten(1).T  # [h * w, C]
    pixels = torch.nan_to_num(pixels - pixels.mean(dim=0))
    u, s, vh = torch.linalg.svd(pixels, full_matrices=False)
    sign = vh.gather(1, vh.abs().argmax(dim=1, keepdim=True)).sign()[:, 0]  # a component's sign is arbitrary
    components = torch.zeros(height * width, 3, dtype=torch.float64)
    count = min(3, s.numel())
    components[:, :count] = (u * s * sign)[:, :count]
    low, high = components.quantile(0.02, dim=0), components.quantile(0.98, dim=0)
    scaled = ((components - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    rgb = (scaled * 255).round().to(torch.uint8).contiguous()
    return Image.frombytes("RGB", (width, height), bytes(rgb.flatten().tolist()))
