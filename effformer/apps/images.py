"""Images in, pictures of feature maps out (extra `image`)."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor

# What `effformer run` writes beside an image must not be an input of the next run.
PICTURE_SUFFIX = ".features.png"

IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"
)  # fmt: skip

_INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def _numbers(values: Any, count: int, above: float) -> bool:
    return len(values) == count and all(math.isfinite(value) and value > above for value in values)


_PREPROCESSING_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "size": ("two integers above 0", lambda v: _numbers(v, 2, 0) and all(isinstance(side, int) for side in v)),
    "mean": ("three finite numbers", lambda v: _numbers(v, 3, -math.inf)),
    "std": ("three finite numbers above 0", lambda v: _numbers(v, 3, 0)),
    "interpolation": (f"one of {', '.join(_INTERPOLATIONS)}", lambda v: v in _INTERPOLATIONS),
    "crop_pct": ("a number above 0, at most 1", lambda v: 0 < v <= 1),
}


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a network's input; the defaults are those of the published ImageNet weights.

    Attributes:
        size: (height, width) of the input.
        mean, std: of the training images, for each channel, after scaling to 0..1.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos".
        crop_pct: share of the resized image's side that the centre crop keeps.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.95

    def __post_init__(self) -> None:
        for name, (allowed, holds) in _PREPROCESSING_RULES.items():
            value = getattr(self, name)
            try:
                good = holds(value)
            except TypeError:
                good = False
            if not good:
                raise ValueError(f"{name}: got {value!r}, allowed is {allowed}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocessing:
        """From timm's `config.json` (its `pretrained_cfg`); what that does not say keeps its default.

        Raises:
            ValueError: naming the field: a value that makes no sense, an interpolation or crop that we do not have,
                an input that is not RGB.
        """
        said = config.get("pretrained_cfg", config)
        if not isinstance(said, Mapping):
            raise ValueError(f"pretrained_cfg: got {said!r}, allowed is an object")
        if said.get("crop_mode", "center") != "center":
            raise ValueError(f"crop_mode: got {said['crop_mode']!r}, allowed is 'center'")
        fields: dict[str, Any] = {key: said[key] for key in ("mean", "std", "interpolation", "crop_pct") if key in said}
        if "input_size" in said:
            size = said["input_size"]
            if not isinstance(size, Sequence) or len(size) != 3 or size[0] != 3:
                raise ValueError(f"input_size: got {size!r}, allowed is [3, height, width]")
            fields["size"] = tuple(size[1:])
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        return cls(**fields)

    def crop(self, image: Image.Image) -> Image.Image:
        """An RGB image, resized and cropped around its centre to `size`, as timm's evaluation does."""
        height, width = self.size
        target = [math.floor(side / self.crop_pct) for side in (height, width)]
        ratio = min(image.height / target[0], image.width / target[1])
        resized = (round(image.width / ratio), round(image.height / ratio))
        image = image.resize(resized, _INTERPOLATIONS[self.interpolation])
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))

    def normalise(self, image: Image.Image) -> Tensor:
        """An RGB image of `size` as the network's input, float32 [3, H, W]."""
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]

    def __call__(self, image: Image.Image) -> Tensor:
        return self.normalise(self.crop(image))


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Files as they are, folders as the files below them with an image's suffix, sorted, without our own pictures.

    Raises:
        FileNotFoundError: for a path that does not exist.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            below = (
                file for file in sorted(path.rglob("*")) if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
            )
            found |= dict.fromkeys(file for file in below if not file.name.endswith(PICTURE_SUFFIX))
        elif path.exists():
            found[path] = None
        else:
            raise FileNotFoundError(f"no such file or folder: {path}")
    return list(found)


def open_image(path: Path) -> Image.Image:
    """The image in a file (its first frame), upright, as RGB; 16-bit grey is scaled to 8 bits.

    Raises:
        OSError: where it cannot be read, is damaged, or has 32-bit pixels, whose range nobody knows.
    """
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
    except Exception as error:  # decoders end in many ways on damaged files
        raise OSError(f"{type(error).__name__}: {error}") from error


def default_workers() -> int:
    """Decoding threads: Pillow and torch leave the interpreter while they work, so one a core, and not more than 8."""
    return min(8, os.cpu_count() or 1)


def read_batches(
    paths: Sequence[Path], preprocessing: Preprocessing, batch_size: int, workers: int
) -> Iterator[tuple[list[int], Tensor | None, dict[int, str]]]:
    """Images as a network's input, decoded in `workers` threads, two batches ahead of the caller.

    Yields:
        for each `batch_size` paths, in their order: (indices of the images that could be read, batch [B, 3, H, W] or
        None if none could, index -> reason of those that could not).
    """

    def read(path: Path) -> Tensor | str:
        try:
            return preprocessing(open_image(path))
        except OSError as error:
            return str(error)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    ahead: deque[tuple[int, list[Future[Tensor | str]]]] = deque()
    try:
        for start in range(0, len(paths), batch_size):
            ahead.append((start, [pool.submit(read, path) for path in paths[start : start + batch_size]]))
            if len(ahead) > 2:
                yield _collate(*ahead.popleft())
        while ahead:
            yield _collate(*ahead.popleft())
    finally:  # a caller that stops early must not wait for what it will not see
        pool.shutdown(cancel_futures=True)


def _collate(start: int, reads: Sequence[Future[Tensor | str]]) -> tuple[list[int], Tensor | None, dict[int, str]]:
    items = {start + offset: read.result() for offset, read in enumerate(reads)}
    readable = {index: item for index, item in items.items() if isinstance(item, Tensor)}
    failures = {index: item for index, item in items.items() if isinstance(item, str)}
    return list(readable), torch.stack(list(readable.values())) if readable else None, failures


def draw_features(image: Image.Image, maps: Sequence[Tensor]) -> Image.Image:
    """The input and each stage's map [C, h, w] in a row: the map's three principal components as red, green, blue."""
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
