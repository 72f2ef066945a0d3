"""The main job: features of image files, through a network, into files beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..model.network import EfficientFormer
from .images import PICTURE_SUFFIX, Preprocessing, draw_features, open_image, read_batches

FEATURES_SUFFIX = ".features.safetensors"


@dataclass(frozen=True)
class ImageFeatures:
    """What the network says of one image.

    Attributes:
        path: the image.
        maps: output of each stage [C, h, w].
        pooled: mean of the tokens after the final norm [C].
        logits: [num_classes], None for a network whose heads were not loaded.
    """

    path: Path
    maps: list[Tensor]
    pooled: Tensor
    logits: Tensor | None

    def save(self, folder: Path | None, preprocessing: Preprocessing, metadata: dict[str, str]) -> tuple[Path, Path]:
        """Write `IMAGE.features.safetensors` and `IMAGE.features.png` into `folder`, or beside the image.

        The tensors are float32 and named stage1 to stage4, pooled and logits; existing files are replaced.

        Raises:
            OSError: where they cannot be written.
        """
        stem = (folder or self.path.parent) / self.path.name
        features, picture = Path(f"{stem}{FEATURES_SUFFIX}"), Path(f"{stem}{PICTURE_SUFFIX}")
        tensors = {f"stage{index}": feature for index, feature in enumerate(self.maps, 1)} | {"pooled": self.pooled}
        if self.logits is not None:
            tensors["logits"] = self.logits
        tensors = {name: tensor.float().contiguous().cpu() for name, tensor in tensors.items()}
        try:
            safetensors.torch.save_file(tensors, features, {"image": self.path.name, **metadata})
        except safetensors.SafetensorError as error:
            raise OSError(f"{features} cannot be written: {error}") from error
        cropped = preprocessing.crop(open_image(self.path))
        draw_features(cropped, [feature.float() for feature in self.maps]).save(picture)
        return features, picture


@dataclass
class Extraction:
    """A run over files; iterate it once, then read `failures`.

    Attributes:
        batch_size: images in a forward.
        workers: threads that decode images.
        has_head: whether the network's heads are trained, and logits worth returning.
        failures: file -> why it could not be read, or its features not written.
    """

    network: EfficientFormer
    paths: Sequence[Path]
    preprocessing: Preprocessing
    batch_size: int = 16
    workers: int = 1
    has_head: bool = False
    failures: dict[Path, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[list[ImageFeatures]]:
        """The features of each batch's readable images, on the network's device."""
        batches = read_batches(self.paths, self.preprocessing, self.batch_size, self.workers)
        for indices, batch, failures in batches:
            self.failures |= {self.paths[index]: reason for index, reason in failures.items()}
            yield [] if batch is None else self._forward(indices, batch)

    def forward_of(self, image: Path) -> Callable[[], object]:
        """A call that runs the network once on a batch of `image`, for timing."""
        batch = self._to_network(self.preprocessing(open_image(image))[None].expand(self.batch_size, -1, -1, -1))
        return torch.no_grad()(lambda: self.network(batch))

    def _to_network(self, batch: Tensor) -> Tensor:
        weight = self.network.stem.conv1.weight
        return batch.to(weight.device, weight.dtype)

    @torch.no_grad()
    def _forward(self, indices: list[int], batch: Tensor) -> list[ImageFeatures]:
        tokens, maps = self.network.forward_intermediates(self._to_network(batch))
        pooled = self.network.forward_head(tokens, pre_logits=True)
        logits = self.network.logits(pooled) if self.has_head else None
        return [
            ImageFeatures(
                self.paths[index],
                [feature[row] for feature in maps],
                pooled[row],
                None if logits is None else logits[row],
            )
            for row, index in enumerate(indices)
        ]
