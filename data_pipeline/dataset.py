"""Random access to one split of a data set: sample ids -> images and labels."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from data_pipeline.decode import BadSampleError, decode_sample
from data_pipeline.description import DatasetDescription, read_description
from data_pipeline.errors import PREPARE_AGAIN, DataError
from data_pipeline.index import ShardIndex, load_index
from data_pipeline.storage import join_url, read_range, size_of


@dataclass(frozen=True, eq=False)
class ShardedDataset:
    """One split. Cheap to hand to other processes: nothing is open."""

    url: str
    split: str
    description: DatasetDescription
    index: ShardIndex

    def __len__(self) -> int:
        return len(self.index)

    def read(self, sample_ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Images uint8 (B, C, H, W) and labels int64 (B,) of `sample_ids` (B,), each in [0, len).

        DataError names the shard and the key where a sample is missing, cut short or damaged.
        """
        images = np.empty((len(sample_ids), *self.description.shape), np.uint8)
        for row, sample_id in enumerate(sample_ids.tolist()):
            images[row] = self._image(sample_id)
        return torch.from_numpy(images), torch.from_numpy(self.index.label[sample_ids].astype(np.int64))

    def check_shards(self) -> None:
        """DataError if a shard is missing or not of its recorded size."""
        for name, size in zip(self._shard_urls, self.index.shard_bytes.tolist(), strict=True):
            if size_of(name) != size:
                raise DataError(f"{name} holds {size_of(name):,} bytes where {size:,} were written: {PREPARE_AGAIN}.")

    @cached_property
    def _shard_urls(self) -> list[str]:
        return [join_url(self.url, name.decode()) for name in self.index.shard_names.tolist()]

    def _image(self, sample_id: int) -> np.ndarray:
        """One image uint8 (C, H, W), checked against the index."""
        index = self.index
        url = self._shard_urls[index.shard[sample_id]]
        data = read_range(url, int(index.offset[sample_id]), int(index.size[sample_id]))
        try:
            key, image, label = decode_sample(data, int(index.crc32[sample_id]), self.description.shape)
            if (key.encode(), label) != (index.key[sample_id], index.label[sample_id]):
                raise BadSampleError(f"the shard says {key!r} of class {label} there")
        except BadSampleError as error:
            name = index.key[sample_id].decode("ascii", "replace")
            raise DataError(f"{url}: sample {name!r} is damaged ({error}): {PREPARE_AGAIN}.") from error
        return image


def open_dataset(url: str, split: str) -> ShardedDataset:
    """The split `split` of the data set in the folder `url`; DataError unless description, index and shards agree."""
    description = read_description(url)
    if split not in description.splits:
        raise DataError(f"{url} has no split {split!r}: choose one of {', '.join(sorted(description.splits))}.")
    expected = description.splits[split]
    index_url = join_url(url, expected.index)
    index = load_index(index_url)
    if len(index) != expected.samples or index.fingerprint != expected.fingerprint:
        raise DataError(f"{index_url} is not the index that dataset.json describes: {PREPARE_AGAIN}.")
    if index.label.max() >= len(description.classes):
        raise DataError(f"{index_url} has labels beyond the {len(description.classes)} classes: {PREPARE_AGAIN}.")
    dataset = ShardedDataset(url, split, description, index)
    dataset.check_shards()
    return dataset
