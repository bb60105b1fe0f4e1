"""Real images for the metrics: all of a split block by block, or as many as fit in memory. Latents are decoded."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from data_pipeline.dataset import ShardedDataset, open_dataset
from data_pipeline.description import DatasetDescription
from sctrain.errors import UserError
from sctrain.latents import LatentSpace, known_convention

BLOCK = 512
MEMORY_BYTES = 2**29


@dataclass(frozen=True)
class DecodedDataset:
    """A split of latents as pictures: each the decoded mean of its Gaussian."""

    latents: ShardedDataset
    space: LatentSpace

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def url(self) -> str:
        return self.latents.url

    @cached_property
    def description(self) -> DatasetDescription:
        """Of the pictures."""
        (picture,) = self.read(np.array([0]))[0]
        channels, height, width = picture.shape
        changes = {"channels": channels, "height": height, "width": width, "latents": None}
        return self.latents.description.model_copy(update=changes)

    def read(self, sample_ids: np.ndarray) -> tuple[Tensor, Tensor]:
        """uint8 (B, 3, H, W) and labels (B,)."""
        latents, labels = self.latents.read(sample_ids)
        return self.space.decoded(latents), labels


RealImages = ShardedDataset | DecodedDataset


def open_pictures(url: str, split: str, vae: Path | None = None) -> RealImages:
    """A split as uint8 images; see `pictures_of`."""
    return pictures_of(open_dataset(url, split), vae)


def pictures_of(dataset: ShardedDataset, vae: Path | None = None) -> RealImages:
    """As uint8 images; `vae` is the folder of the decoder of latents. UserError where latents have none."""
    about = dataset.description.latents
    if about is None:
        return dataset
    if vae is None:
        raise UserError(
            f"{dataset.url} holds latents: name their decoder's folder with 'data.vae', to score pictures of them"
        )
    return DecodedDataset(dataset, LatentSpace((0.0,), (1.0,), 1.0, 1.0, vae, known_convention(about.convention)))


def blocks(dataset: RealImages) -> Iterator[Tensor]:
    """The images of a split in order, uint8 (<= 512, C, H, W)."""
    for start in range(0, len(dataset), BLOCK):
        yield dataset.read(np.arange(start, min(start + BLOCK, len(dataset))))[0]


def in_memory(dataset: RealImages, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """(images, labels) of the whole split, or of `limit` evenly spaced samples (None: as many as 512 MiB hold)."""
    about = dataset.description
    limit = limit or max(1, MEMORY_BYTES // (about.channels * about.height * about.width))
    return dataset.read(evenly_spaced(len(dataset), limit))


def evenly_spaced(size: int, limit: int) -> np.ndarray:
    """At most `limit` distinct indices below `size`."""
    return np.arange(size) if size <= limit else np.linspace(0, size - 1, limit).astype(np.int64)
