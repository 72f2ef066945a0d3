"""Draw pictures of feature maps (extra `image`)."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

LABEL_HEIGHT = 30  # of the line below a picture of feature maps


def draw_features(image: Image.Image, maps: Sequence[Tensor], label: str | None = None) -> Image.Image:
    """The input and each stage's map [C, h, w] in a row: the map's three principal components as red, green, blue.

    Each has a title above it. The label stands in a line below, shortened if it is wider than the picture.
    """
    from PIL import Image, ImageDraw, ImageFont

    side, margin, gap, font = max(224, image.height), 18, 4, ImageFont.load_default(12)
    width = round(image.width * side / image.height)
    panels = [(f"input {image.height}x{image.width}", image)]
    panels += [(f"stage {i}: {m.shape[0]}x{m.shape[1]}x{m.shape[2]}", _principal(m)) for i, m in enumerate(maps, 1)]
    column = max(width, *(math.ceil(font.getlength(title)) + 2 * gap for title, _ in panels))
    total = len(panels) * (column + gap) - gap
    picture = Image.new("RGB", (total, side + margin + (LABEL_HEIGHT if label else 0)), "white")
    draw = ImageDraw.Draw(picture)
    for position, (title, panel) in enumerate(panels):
        left = position * (column + gap)
        picture.paste(panel.resize((width, side), Image.Resampling.NEAREST), (left, margin))
        draw.text((left + 2, margin - gap), title, fill="black", font=font, anchor="ls")
    if label:
        font = ImageFont.load_default(18)
        shown = _fitting(label, lambda text: font.getlength(text) <= total - 2 * gap)
        draw.text((gap, side + margin + LABEL_HEIGHT // 2), shown, fill="black", font=font, anchor="lm")
    return picture


def _fitting(text: str, fits: Callable[[str], bool]) -> str:
    """The text, or as much of its beginning as fits, in ASCII: Pillow's font has no other letters."""
    plain = unicodedata.normalize("NFKD", text)
    text = "".join(letter for letter in plain if not unicodedata.combining(letter)).encode("ascii", "replace").decode()
    shorter = (f"{text[:end].rstrip()}..." for end in range(len(text), 0, -1))
    return text if fits(text) else next(filter(fits, shorter), "...")


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
