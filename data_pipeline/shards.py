"""Writing one split: sources -> `SPLIT-000000.tar`, ... and `index-SPLIT.npz`.

Samples are shuffled across classes with a fixed seed, images become PNG, and everything that could differ between two
writings (times, owners, order) is fixed, so the same input gives the same bytes. The shards are ordinary webdataset ones.
"""

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple, TypeAlias

import numpy as np
from webdataset.writer import TarWriter

from data_pipeline.decode import encode_png
from data_pipeline.index import ShardIndex
from data_pipeline.order import random_bits, random_permutation

SHUFFLE_SEED = 0
SHARD_BYTES = 256 * 2**20  # a shard is closed once it is this large
SHARD_SAMPLES = 4096
READ_AHEAD = 16  # samples per thread


class Source(NamedTuple):
    """One sample to be written; `load` gives its image uint8 (C, H, W) and may raise DataError."""

    key: str
    label: int
    load: Callable[[], np.ndarray]


Progress: TypeAlias = Callable[[Sequence[Source]], Iterable[Source]]  # wraps what is iterated, as tqdm does


class _Encoded(NamedTuple):
    key: str
    label: int
    png: bytes
    histogram: np.ndarray  # (C, 256) int64


def write_split(
    folder: Path, split: str, sources: Sequence[Source], samples_per_shard: int, progress: Progress
) -> tuple[ShardIndex, np.ndarray]:
    """Write one split into `folder`; returns its index and its pixel histogram (C, 256) int64."""
    order = random_permutation(random_bits(SHUFFLE_SEED, 0), len(sources))
    shards = _ShardWriter(folder, split, samples_per_shard)
    histogram = np.zeros(1, np.int64)
    with shards:
        for sample in _encode_ahead(progress([sources[position] for position in order])):
            shards.write(sample)
            histogram = histogram + sample.histogram
    index = shards.index()
    with (folder / index_name(split)).open("wb") as file:
        index.save(file)
        sync(file)
    return index, histogram


def index_name(split: str) -> str:
    return f"index-{split}.npz"


def sync(file: IO[bytes]) -> None:
    """Force a file to disk."""
    file.flush()
    os.fsync(file.fileno())


class _ShardWriter:
    """Appends samples, starts a new shard when one is full, and remembers where each sample went."""

    def __init__(self, folder: Path, split: str, samples_per_shard: int):
        self._folder = folder
        self._split = split
        self._samples_per_shard = samples_per_shard
        self._file: IO[bytes] | None = None
        self._shards: list[tuple[bytes, int]] = []  # name, bytes
        self._rows: list[tuple[bytes, int, int, int, int]] = []  # key, shard, offset, size, label
