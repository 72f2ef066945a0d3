"""Compute the features of image files, and write them into files."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..files import write_together
from ..model.network import EfficientFormer
from .batches import read_batches
from .images import PICTURE_SUFFIX, Preprocessing
from .pictures import draw_features


@dataclass(frozen=True)
class ImageFeatures:
    """The network's features of one image.

    Attributes:
        path: the image.
        x: the network's input made of it, float32 [3, H, W], on the CPU.
        maps: output of each stage [C, h, w].
        pooled: mean of the tokens after the final norm [C].
        logits: [num_classes], None for a network without trained heads.
    """

    path: Path
    x: Tensor
    maps: list[Tensor]
    pooled: Tensor
    logits: Tensor | None

    def save(
        self, place: Path, preprocessing: Preprocessing, metadata: dict[str, str], label: str | None
    ) -> tuple[Path, Path]:
        """Write `PLACE.features.safetensors` and `PLACE.features.png`, both or none.

        The tensors are float32 and named stage1 to stage4, pooled and logits. Existing files are replaced, missing
        folders made. The label stands below the picture.

        Raises:
            OSError: where they cannot be written.
        """
        features, picture = Path(f"{place}.features.safetensors"), Path(f"{place}{PICTURE_SUFFIX}")
        tensors = {f"stage{index}": feature for index, feature in enumerate(self.maps, 1)} | {"pooled": self.pooled}
        if self.logits is not None:
            tensors["logits"] = self.logits
        tensors = {name: tensor.float().contiguous().cpu() for name, tensor in tensors.items()}
        drawn, image = io.BytesIO(), preprocessing.picture(self.x)
        draw_features(image, [feature.float() for feature in self.maps], label).save(drawn, "PNG")
        write_together({features: safetensors.torch.save(tensors, metadata), picture: drawn.getvalue()})
        return features, picture


@torch.no_grad()
def extract(
    network: EfficientFormer, paths: Sequence[Path], preprocessing: Preprocessing, batch_size: int, *, has_head: bool
) -> Iterator[tuple[list[ImageFeatures], dict[Path, str]]]:
    """Run `network` on files, `batch_size` in a forward; `has_head`: its heads are trained, so logits are wanted.

    Yields:
        for each batch: the features of its readable images, on the network's device, and file -> why it could not be
        read.
    """
    weight = network.stem.conv1.weight
    for indices, batch, unread in read_batches(paths, preprocessing, batch_size):
        failures = {paths[index]: reason for index, reason in unread.items()}
        if batch is None:
            yield [], failures
            continue
        tokens, maps = network.forward_intermediates(batch.to(weight.device, weight.dtype))
        pooled = network.forward_head(tokens, pre_logits=True)
        logits = network.logits(pooled) if has_head else [None] * len(pooled)
        of_images = zip(indices, batch, zip(*maps, strict=True), pooled, logits, strict=True)
        yield [ImageFeatures(paths[index], x, list(maps), *others) for index, x, maps, *others in of_images], failures
