"""Images in, pictures of feature maps out (extra `image`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor

# What `effformer run` writes beside an image must not be an input of the next run.
PICTURE_SUFFIX = ".features.png"

_INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
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

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocessing:
        """From timm's `config.json` (its `pretrained_cfg`); what that does not say keeps its default.

        Raises:
            ValueError: for an interpolation or a crop that we do not have, or an input that is not RGB.
        """
        said = config.get("pretrained_cfg", config)
        default = cls()
        channels, *size = said.get("input_size", (3, *default.size))
        interpolation = said.get("interpolation", default.interpolation)
        if channels != 3 or len(size) != 2:
            raise ValueError(f"input_size: got {said['input_size']}, allowed is [3, height, width]")
        if interpolation not in _INTERPOLATIONS:
            raise ValueError(f"interpolation: got {interpolation!r}, allowed are {', '.join(_INTERPOLATIONS)}")
        if said.get("crop_mode", "center") != "center":
            raise ValueError(f"crop_mode: got {said['crop_mode']!r}, allowed is 'center'")
        return cls(
            size=(int(size[0]), int(size[1])),
            mean=tuple(said.get("mean", default.mean)),
            std=tuple(said.get("std", default.std)),
            interpolation=interpolation,
            crop_pct=float(said.get("crop_pct", default.crop_pct)),
        )

    def crop(self, image: Image.Image) -> Image.Image:
        """`image` upright, in RGB, resized and cropped around its centre to `size`, as timm's evaluation does."""
        image = ImageOps.exif_transpose(image).convert("RGB")
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
    """Files as they are, folders as the image files below them, sorted; pictures of an earlier run left out.

    Raises:
        FileNotFoundError: for a path that does not exist.
    """
    suffixes = set(Image.registered_extensions())
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            below = (file for file in sorted(path.rglob("*")) if file.suffix.lower() in suffixes and file.is_file())
            found |= dict.fromkeys(file for file in below if not file.name.endswith(PICTURE_SUFFIX))
        elif path.exists():
            found[path] = None
        else:
            raise FileNotFoundError(f"no such file or folder: {path}")
    return list(found)


def open_image(path: Path) -> Image.Image:
    """A decoded image.

    Raises:
        OSError: where it cannot be read or is damaged.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except UnidentifiedImageError:
        raise OSError("not an image") from None
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises for damaged files
        raise OSError(str(error)) from error


class ImageFiles(torch.utils.data.Dataset[tuple[int, Tensor | str]]):
    """(index, input [3, H, W]) of each file, or (index, why it cannot be read)."""

    def __init__(self, paths: Sequence[Path], preprocessing: Preprocessing) -> None:
        self.paths = paths
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, self.preprocessing(open_image(self.paths[index]))
        except OSError as error:
            return index, str(error)


def collate(items: list[tuple[int, Tensor | str]]) -> tuple[list[int], Tensor | None, dict[int, str]]:
    """(indices, batch [B, 3, H, W] or None if none could be read, reasons of those that could not)."""
    readable = [(index, item) for index, item in items if isinstance(item, Tensor)]
    failures = {index: item for index, item in items if isinstance(item, str)}
    batch = torch.stack([item for _, item in readable]) if readable else None
    return [index for index, _ in readable], batch, failures


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
