"""Real images for the metrics: all of a split block by block, or as many as fit in memory."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from data_pipeline.dataset import ShardedDataset

BLOCK = 512
MEMORY_BYTES = 2**29


def blocks(dataset: ShardedDataset) -> Iterator[Tensor]:
    """The images of a split in order, uint8 (<= 512, C, H, W)."""
    for start in range(0, len(dataset), BLOCK):
        yield dataset.read(np.arange(start, min(start + BLOCK, len(dataset))))[0]


def in_memory(dataset: ShardedDataset, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """(images, labels) of the whole split, or of `limit` evenly spaced samples (None: as many as 512 MiB hold)."""
    about = dataset.description
    limit = limit or max(1, MEMORY_BYTES // (about.channels * about.height * about.width))
    return dataset.read(evenly_spaced(len(dataset), limit))


def evenly_spaced(size: int, limit: int) -> np.ndarray:
    """At most `limit` distinct indices below `size`."""
    return np.arange(size) if size <= limit else np.linspace(0, size - 1, limit).astype(np.int64)
