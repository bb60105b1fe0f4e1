"""Random access to one split of a data set: sample ids -> images or latents, and labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from data_pipeline.cache import CacheOptions, SpanCache
from data_pipeline.decode import BadSampleError, decode_sample
from data_pipeline.description import DESCRIPTION_FILE, DatasetDescription, read_description
from data_pipeline.errors import PREPARE_AGAIN, DamagedError, DataError, MissingError
from data_pipeline.fetch import DirectFetcher, Fetched, Fetcher, SpanFetcher
from data_pipeline.index import SPAN_BYTES, ShardIndex, load_index
from data_pipeline.looks import look_again
from data_pipeline.storage import forget, is_remote, join_url, sizes_in

LOOKS = 8  # at what does not fit its checksum: a store may mix up a fifth of its answers, and is still read right
REQUEST_WORTH = 256 * 2**10  # bytes that a store sends in about the time that it takes to answer


@dataclass(frozen=True, eq=False)
class ShardedDataset:
    """One split. Cheap to hand to other processes: nothing is open until something is read, and only in its process."""

    url: str
    split: str
    description: DatasetDescription
    index: ShardIndex
    cache: CacheOptions = field(default_factory=CacheOptions)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, sample_ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Images uint8 (B, C, H, W) and labels int64 (B,) of `sample_ids` (B,), each in [0, len).

        Of latents, in the type they are stored in; of a Gaussian its mean, float32. DataError names the shard and the
        key where a sample is missing, cut short or damaged.
        """
        arrays, problems = self.decode(sample_ids, self._fetcher.read(sample_ids), self._fetcher)
        for problem in problems.values():
            raise problem
        return as_tensor(arrays, self.description), self.labels(sample_ids)

    def labels(self, sample_ids: np.ndarray) -> torch.Tensor:
        """Class numbers int64 (B,)."""
        return torch.from_numpy(self.index.label[sample_ids].astype(np.int64))

    def decode(
        self, sample_ids: np.ndarray, fetched: Sequence[Fetched], fetcher: Fetcher
    ) -> tuple[np.ndarray, Mapping[int, DamagedError | MissingError]]:
        """What is stored of the samples (B, ...), and what is wrong with some rows, which are undefined then.

        What `fetcher` has `fetched` and does not fit its checksum is read once more from its source.
        """
        arrays = np.empty((len(sample_ids), *self.stored_shape), self.stored_type)
        problems: dict[int, DamagedError | MissingError] = {}
        for row, (sample_id, data) in enumerate(zip(sample_ids.tolist(), fetched, strict=True)):
            try:
                arrays[row] = self._stored(sample_id, data, fetcher)
            except (DamagedError, MissingError) as error:
                problems[row] = error
        return arrays, problems

    def named(self, sample_id: int, problem: DamagedError | MissingError) -> str:
        """A sentence that names shard and key of a sample that cannot be read."""
        if isinstance(problem, DamagedError):
            return str(problem)
        return f"sample {self._name(sample_id)!r} is lost: {problem}"

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what is stored of a sample; 2C where a latent's mean and standard deviation are."""
        channels, height, width = self.description.shape
        latents = self.description.latents
        return channels * (2 if latents is not None and latents.content == "mean_std" else 1), height, width

    @property
    def stored_type(self) -> str:
        """Of the elements of what is stored."""
        return "uint8" if self.description.latents is None else self.description.latents.dtype

    def check_shards(self) -> None:
        """DataError if a shard is missing or not of its recorded size; web servers cannot be asked for all at once."""
        found = sizes_in(self.url)
        if found is None:
            return
        names = [name.decode() for name in self.index.shard_names.tolist()]
        for name, shard, size in zip(names, self.shard_urls, self.index.shard_bytes.tolist(), strict=True):
            if name not in found:
                raise MissingError(f"{shard} does not exist: {PREPARE_AGAIN}.")
            if found[name] != size:
                raise DataError(f"{shard} holds {found[name]:,} bytes where {size:,} were written: {PREPARE_AGAIN}.")

    def reads_spans(self, window: int, nodes: int) -> bool:
        """Whether streaming in the order of a window goes through the cache.

        Every machine then fetches every span, but uses only its share: with large samples, or many machines, single
        requests cost less. And a cache that cannot hold what the window spreads over would fetch spans again and again.
        """
        if not is_remote(self.url) or self.index.mean_bytes * nodes > REQUEST_WORTH:
            return False
        return self.cache.limit >= self.window_bytes(window)

    def window_bytes(self, window: int) -> int:
        """How many bytes a shuffle window keeps in use."""
        return int(min(2 * window, len(self)) * self.index.mean_bytes) + SPAN_BYTES

    def fetcher(self, *, spans: bool = False) -> Fetcher:
        """Access for one process, to be closed."""
        if not spans:
            return DirectFetcher(self.index, self.shard_urls)
        owner = f"{self.index.fingerprint[:32]}-{SPAN_BYTES}"
        return SpanFetcher(self.index, self.shard_urls, SpanCache(self.cache, owner))

    @cached_property
    def _fetcher(self) -> Fetcher:
        return self.fetcher()

    @cached_property
    def shard_urls(self) -> list[str]:
        """Where the shards are, in the order of the index."""
        return [join_url(self.url, name.decode()) for name in self.index.shard_names.tolist()]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_fetcher"}

    def _name(self, sample_id: int) -> str:
        return self.index.key[sample_id].decode("ascii", "replace")

    def _stored(self, sample_id: int, data: bytes | MissingError, fetcher: Fetcher) -> np.ndarray:
        """What is stored of one sample, checked against the index."""
        if isinstance(data, MissingError):
            raise data
        try:
            return self._decoded(sample_id, data)
        except BadSampleError:
            pass
        array = self._decoded_again(sample_id, fetcher)
        fetcher.spoiled(sample_id)
        return array

    def _decoded_again(self, sample_id: int, fetcher: Fetcher) -> np.ndarray:
        """What its source has; asked several times where it may give something else now and then."""
        url = self.shard_urls[self.index.shard[sample_id]]

        def read() -> np.ndarray:
            try:
                return self._decoded(sample_id, fetcher.again(sample_id))
            except BadSampleError as error:
                raise DamagedError(
                    f"{url}: sample {self._name(sample_id)!r} is damaged ({error}): {PREPARE_AGAIN}."
                ) from error

        return look_again([url], read, LOOKS)

    def _decoded(self, sample_id: int, data: bytes) -> np.ndarray:
        index, latents = self.index, self.description.latents
        crc32 = int(index.crc32[sample_id])
        key, array, label = decode_sample(data, crc32, self.stored_shape, latents and latents.dtype)
        if (key.encode(), label) != (index.key[sample_id], index.label[sample_id]):
            raise BadSampleError(f"the shard says {key!r} of class {label} there")
        return array


def as_tensor(stored: np.ndarray, about: DatasetDescription, noise: np.ndarray | None = None) -> torch.Tensor:
    """What training sees of what is stored: images and latents (B, C, H, W) in the type that they are stored in.

    Of a Gaussian: mean + std * `noise` (B, C, H, W), or the mean, in float32.
    """
    tensor = torch.from_numpy(stored)
    if about.latents is None or about.latents.content == "mean":
        return tensor
    mean, std = tensor.float().chunk(2, dim=1)  # numpy takes several times as long to convert from float16
    return mean.contiguous() if noise is None else mean + std * torch.from_numpy(noise)


def open_dataset(
    url: str, split: str, *, cache: CacheOptions | None = None, tolerate_loss: bool = False
) -> ShardedDataset:
    """The split `split` of the data set in the folder `url`; DataError unless description, index and shards agree.

    Shards are compared with the list of the folder or bucket, unless some may be lost. A web server has no list, and a
    request for each shard would cost minutes: there, reading finds what is wrong with them.
    """
    description, index = look_again([join_url(url, DESCRIPTION_FILE)], lambda: _described(url, split))
    dataset = ShardedDataset(url, split, description, index, cache or CacheOptions())
    if not tolerate_loss:
        dataset.check_shards()
    return dataset


def _described(url: str, split: str) -> tuple[DatasetDescription, ShardIndex]:
    """Description and index, which must agree."""
    description = read_description(url)
    if split not in description.splits:
        raise DataError(f"{url} has no split {split!r}: choose one of {', '.join(sorted(description.splits))}.")
    expected = description.splits[split]
    index_url = join_url(url, expected.index)
    index = load_index(index_url)
    forget(index_url)  # all that is wanted of it is here, and if it is another, the next look shall be a new one
    if len(index) != expected.samples or index.fingerprint != expected.fingerprint:
        raise DamagedError(f"{index_url} is not the index that dataset.json describes: {PREPARE_AGAIN}.")
    if index.label.max() >= len(description.classes):
        raise DamagedError(f"{index_url} has labels beyond the {len(description.classes)} classes: {PREPARE_AGAIN}.")
    return description, index
