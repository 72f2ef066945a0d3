"""Find image files, and turn them into a network's input (extra `image`)."""

from __future__ import annotations

import math
import os
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import FINITE, POSITIVE, Rule, check, is_int, is_number, one_of
from ..config import LEAST_SIDE, PUBLISHED_INPUT

if TYPE_CHECKING:
    from PIL import Image

# `effformer run` writes these; they must not be inputs of the next run.
PICTURE_SUFFIX = ".features.png"
# A JPEG file is decoded at a fraction of its size that leaves at least so many times the resized image's sides. Others
# are reduced to one instead of being copied whole. Crops then differ from those of the whole image by some levels of
# 255 at sharp edges, and by a fraction of one on average.
REDUCING_GAP = 4
_STRIP = 64  # rows of a reduced image that are made at once
WIDEST = 16  # a resized image has at most so many times the crop's pixels; of a longer strip only the crop is made

IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"
)  # fmt: skip
_BESIDE = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")


def _each(rule: Rule, count: int) -> Rule:
    return Rule(
        f"a sequence of {count}, each {rule.allowed}",
        lambda values: isinstance(values, tuple) and len(values) == count and all(map(rule.holds, values)),
    )


_SIDE = Rule(f"an integer of {LEAST_SIDE} or more", lambda value: is_int(value) and value >= LEAST_SIDE)
_RULES = {
    "size": _each(_SIDE, 2),
    "mean": _each(FINITE, 3),
    "std": _each(POSITIVE, 3),
    "interpolation": one_of(("nearest", "bilinear", "bicubic", "lanczos")),
    "crop_pct": Rule("a number above 0, at most 1", lambda value: is_number(value) and 0 < value <= 1),
}


@dataclass(frozen=True)
class Preprocessing:
    """Turns an image into a network's input; the defaults are those of the published ImageNet weights.

    Attributes:
        size: (height, width) of the input, 32 or more each.
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
            value = getattr(self, name)
            if isinstance(value, list) or getattr(value, "ndim", 0) == 1:  # an array
                value = tuple(value)
            object.__setattr__(self, name, check(name, value, rule))

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
        return cls(**fields)

    def crop(self, image: Image.Image) -> Image.Image:
        """An RGB image, resized and cropped around its centre to `size`, as timm's evaluation does.

        Raises:
            TypeError: for other values than a PIL image of mode RGB.
        """
        _check_rgb(image)
        return self._crop(image, image.size, (0, 0, *image.size))

    def _crop(
        self, image: Image.Image, whole: tuple[int, int], within: tuple[float, float, float, float]
    ) -> Image.Image:
        """The crop of a whole image of this (width, height), which was decoded into the box `within` of `image`."""
        from PIL.Image import Resampling

        (height, width), resampling = self.size, Resampling[self.interpolation.upper()]
        least = self._least()
        ratio = min(whole[1] / least[0], whole[0] / least[1])
        resized = (round(whole[0] / ratio), round(whole[1] / ratio))
        left, top = round((resized[0] - width) / 2), round((resized[1] - height) / 2)
        box = (left, top, left + width, top + height)
        if math.prod(resized) <= WIDEST * width * height:
            return image.resize(resized, resampling, box=within).crop(box)
        # A strip of 1 x 60,000 would become one of 235 x 14,100,000. Rounding differs: a box has single precision.
        across, down = (within[2] - within[0]) / resized[0], (within[3] - within[1]) / resized[1]
        right, bottom = within[0] + box[2] * across, within[1] + box[3] * down
        source = (within[0] + left * across, within[1] + top * down, min(right, within[2]), min(bottom, within[3]))
        return image.resize((width, height), resampling, box=source)

    def _least(self) -> tuple[int, int]:
        """The least (height, width) of the resized image, whose centre is cropped."""
        height, width = self.size
        return math.floor(height / self.crop_pct), math.floor(width / self.crop_pct)

    def read(self, path: Path) -> Image.Image:
        """The crop of an image file; of a large JPEG file, decoded at a fraction of its size.

        Raises:
            OSError: as `open_image`, and for an image that does not fit into memory.
        """
        with _as_os_error():
            image, whole, within = _open(path, REDUCING_GAP * max(self._least()))
            return self.crop(image) if image.size == whole else self._crop(image, whole, within)

    def normalise(self, image: Image.Image) -> Tensor:
        """An RGB image of `size` as a network's input, float32 [3, H, W].

        Raises:
            TypeError: for other values than a PIL image of mode RGB.
            ValueError: for an image of another size.
        """
        _check_rgb(image)
        if image.size != self.size[::-1]:
            (height, width), found = self.size, f"{image.height}x{image.width} (height x width)"
            raise ValueError(f"image: got one of {found}, allowed is {height}x{width}, as `crop` makes it")
        return self._batch(image.tobytes())[0]

    def picture(self, x: Tensor) -> Image.Image:
        """The RGB image that `normalise` made float32 [3, H, W] of."""
        from PIL import Image

        levels = (x.cpu() * x.new_tensor(self.std)[:, None, None] + x.new_tensor(self.mean)[:, None, None]) * 255
        pixels = levels.round().to(torch.uint8).permute(1, 2, 0).contiguous()
        return Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), bytes(pixels.flatten().tolist()))

    def _batch(self, *crops: bytes) -> Tensor:
        """Crops' RGB pixels as a network's input, float32 [B, 3, H, W]."""
        pixels = torch.frombuffer(bytearray().join(crops), dtype=torch.uint8).view(len(crops), *self.size, 3)
        images = pixels.permute(0, 3, 1, 2).float() / 255
        return (images - images.new_tensor(self.mean)[:, None, None]) / images.new_tensor(self.std)[:, None, None]

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB image as a network's input, float32 [3, H, W].

        Raises:
            TypeError: for other values than a PIL image of mode RGB.
        """
        return self.normalise(self.crop(image))


def _check_rgb(image: Any) -> None:
    from PIL import Image

    if not isinstance(image, Image.Image):
        remedy = "Image.fromarray(image)" if hasattr(image, "__array__") else "Image.open(path)"
        raise TypeError(
            f"image: got {type(image).__name__}, allowed is a PIL image of mode RGB: {remedy}.convert('RGB')"
        )
    if image.mode != "RGB":
        raise TypeError(f"image: got a PIL image of mode {image.mode}, allowed is RGB: image.convert('RGB')")


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Files as they are; of folders, the images below them, sorted.

    These are all entries with an image's suffix, also those that cannot be read. Not among them are our own pictures,
    and hidden files and folders (see `is_hidden`). A folder that cannot be listed stands for itself.

    Raises:
        FileNotFoundError: for a path that does not exist.
    """
    return list(find_places(paths))


def find_places(paths: Iterable[str | Path]) -> dict[Path, Path]:
    """The files of `find_images`, each with its place in a copy of the tree.

    The place of a file that `paths` names is its name. In a folder it is the path from there; if `paths` are several,
    the folder's name stands before it.

    Raises:
        FileNotFoundError: as `find_images`.
    """
    named = list(dict.fromkeys(map(Path, paths)))
    found: dict[Path, Path] = {}
    for path in named:
        if path.is_dir():
            top = Path(path.resolve().name if len(named) > 1 else "")
            for file in filter(is_image, files_below(path)):
                found.setdefault(file, top / file.relative_to(path))
        elif os.path.lexists(path):
            found.setdefault(path, Path(path.name))
        else:
            raise FileNotFoundError(f"no such file or folder: {path}")
    return found


def is_image(path: Path) -> bool:
    """Whether a file or folder that `files_below` found counts as an image."""
    return path.is_dir() or (path.suffix.lower() in IMAGE_SUFFIXES and not path.name.endswith(PICTURE_SUFFIX))


def is_hidden(name: str) -> bool:
    """Whether a name is of those that systems keep beside images: .git, attributes of macOS, thumbnails, bins."""
    return name.startswith(".") or name in _BESIDE


def files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The files below a folder, sorted, without hidden ones; links are followed, but not in circles.

    A folder that cannot be listed is a result itself.
    """
    real = folder.resolve()
    if real in above:
        return
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        yield folder
        return
    for path in (folder / name for name in names if not is_hidden(name)):
        if os.path.isdir(path):
            yield from files_below(path, (*above, real))
        else:
            yield path


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Turn an image's failure into an OSError of one line: decoders raise many types on damaged files."""
    from PIL import UnidentifiedImageError

    try:
        yield
    except UnidentifiedImageError:
        raise OSError("not an image") from None
    except OSError as error:
        raise OSError(error.strerror or " ".join(str(error).split())) from error
    except MemoryError:
        raise OSError("it does not fit into memory") from None
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def open_image(path: Path) -> Image.Image:
    """The image in a file (its first frame), upright, as RGB; 16-bit grey is scaled to 8 bits.

    Raises:
        OSError: where it cannot be read, is damaged, is not a regular file (reading a pipe would wait), has more pixels
            than Pillow allows, or has 32-bit pixels, whose range is not defined.
    """
    return _open(path)[0]


def _open(
    path: Path, least: int | None = None
) -> tuple[Image.Image, tuple[int, int], tuple[float, float, float, float]]:
    """`open_image`, the (width, height) of the whole image, and the box that holds it.

    With `least`, a JPEG file is decoded at 1/2, 1/4 or 1/8 of its size, if both sides keep so many pixels. An image
    that has to be turned, or is not RGB, is then reduced by the whole number that leaves as many. The last column and
    row may then be fractions of pixels; they lie where turning the image puts them.
    """
    from PIL import ExifTags, Image, ImageOps

    with _as_os_error(), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # at half of the pixels that are allowed
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(f"not a regular file, but {'a folder' if path.is_dir() else 'a pipe, a socket or a device'}")
        with Image.open(path) as image:
            stored = image.size
            if least is not None:
                image.draft(None, (least, least))
            image.load()
            reduction = round(stored[0] / image.width)
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            upright: Image.Image = image
            factor = 1 if least is None else min(image.size) // least
            if factor > 1 and (image.mode != "RGB" or orientation != 1):
                upright, reduction = _reduced(image, factor), reduction * factor
                upright.getexif()[ExifTags.Base.Orientation] = orientation
            ImageOps.exif_transpose(upright, in_place=True)
            whole = stored[::-1] if orientation in (5, 6, 7, 8) else stored
            width, height = whole[0] / reduction, whole[1] / reduction
            left = upright.width - width if orientation in (2, 3, 6, 7) else 0
            top = upright.height - height if orientation in (3, 4, 7, 8) else 0
            return _rgb(upright), whole, (left, top, left + width, top + height)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise OSError(f"32-bit pixels (mode {image.mode}) have no defined range")
    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value * (1 / 257)).convert("L")
    return image if image.mode == "RGB" else image.convert("RGB")


def _reduced(image: Image.Image, factor: int) -> Image.Image:
    """The image as RGB, its sides divided by `factor` and rounded up, without a whole copy at its own size."""
    from PIL import Image

    reduced = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for top in range(0, reduced.height, _STRIP):
        bottom = min((top + _STRIP) * factor, image.height)
        reduced.paste(_rgb(image.crop((0, top * factor, image.width, bottom))).reduce(factor), (0, top))
    return reduced
