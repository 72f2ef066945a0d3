"""Random pictures in class folders, and a plain count of right predictions."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageFilter

from effformer import EfficientFormer, set_backend
from effformer.apps.images import Preprocessing, open_image

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


def inputs(photos: Path) -> torch.Tensor:
    return torch.stack([SMALL(open_image(path)) for path in sorted(photos.rglob("*.*"))])


@torch.no_grad()
def spread_predictions(network: EfficientFormer, x: torch.Tensor) -> EfficientFormer:
    """Move the biases so that no class is likelier than another over x: random weights alone prefer one for all."""
    logits = network(x.to(network.head.weight.dtype))
    network.head.bias -= 2 * logits.mean(dim=0)  # the logits are the mean of two heads
    return network


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
