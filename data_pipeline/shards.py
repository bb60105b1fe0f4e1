"""Writing one split: sources -> `SPLIT-000000.tar`, ... and `index-SPLIT.npz`.

Samples are shuffled across classes with a fixed seed, images become PNG, and everything that could differ between two
writings (times, owners, order) is fixed, so the same input gives the same bytes. Plain webdataset opens the shards too.
"""

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import IO, NamedTuple, TypeAlias

import numpy as np
from webdataset.writer import TarWriter

from data_pipeline.decode import LABEL, encode_png
from data_pipeline.index import ShardIndex
from data_pipeline.order import random_bits, random_permutation

SHUFFLE_SEED = 0
SHARD_BYTES = 256 * 2**20  # a shard is closed once it is this large
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
    histogram: np.ndarray  # (C, 256) int64: how many pixels have each value


class _Row(NamedTuple):
    """Where one sample went: the sample columns of the index."""

    key: bytes
    shard: int
    offset: int
    size: int
    label: int
    crc32: int


def write_split(
    folder: Path, split: str, sources: Sequence[Source], samples_per_shard: int, progress: Progress
) -> tuple[ShardIndex, np.ndarray]:
    """Write one split into `folder`; returns its index and its pixel histogram (C, 256) int64."""
    samples = _Counted(_encode_ahead(progress(_shuffled(sources))))
    shards: list[Path] = []
    rows: list[_Row] = []
    for first in samples:
        shards.append(folder / f"{split}-{len(shards):06d}.tar")
        full = islice(chain([first], samples), samples_per_shard)
        rows += _write_shard(shards[-1], len(shards) - 1, full)
    index = _index(shards, rows)
    with (folder / index_name(split)).open("wb") as file:
        index.save(file)
        sync(file)
    return index, samples.histogram


def index_name(split: str) -> str:
    return f"index-{split}.npz"


def sync(file: IO[bytes]) -> None:
    """Force a file to disk."""
    file.flush()
    os.fsync(file.fileno())


class _Counted(Iterator[_Encoded]):
    """Adds up the pixel histograms of the samples that pass."""

    def __init__(self, samples: Iterator[_Encoded]):
        self._samples = samples
        self.histogram: np.ndarray = np.zeros(256, np.int64)

    def __next__(self) -> _Encoded:
        sample = next(self._samples)
        self.histogram = self.histogram + sample.histogram
        return sample


def _shuffled(sources: Sequence[Source]) -> list[Source]:
    order = random_permutation(random_bits(SHUFFLE_SEED, 0), len(sources))
    return [sources[position] for position in order.tolist()]


def _encode_ahead(sources: Iterable[Source]) -> Iterator[_Encoded]:
    """Load and encode on all cores (Pillow releases the interpreter lock), a bounded number ahead, in order."""
    threads = len(os.sched_getaffinity(0))
    remaining = iter(sources)
    with ThreadPoolExecutor(threads) as pool:
        while group := list(islice(remaining, READ_AHEAD * threads)):
            yield from pool.map(_encode, group)


def _encode(source: Source) -> _Encoded:
    pixels = source.load()
    histogram = np.stack([np.bincount(channel.ravel(), minlength=256) for channel in pixels])
    return _Encoded(source.key, source.label, encode_png(pixels), histogram)


def _write_shard(path: Path, number: int, samples: Iterable[_Encoded]) -> list[_Row]:
    """Write samples up to SHARD_BYTES into a new shard; the checksums are of what can be read back from it."""
    rows: list[_Row] = []
    with path.open("w+b") as file:
        with TarWriter(file, encoder=False, mtime=0) as tar:
            for sample in samples:
                start = tar.tarstream.offset
                tar.write({"__key__": sample.key, "png": sample.png, LABEL: str(sample.label).encode()})
                end = tar.tarstream.offset
                rows.append(_Row(sample.key.encode("ascii"), number, start, end - start, sample.label, 0))
                if end >= SHARD_BYTES:
                    break
        sync(file)
        file.seek(0)
        return [row._replace(crc32=zlib.crc32(file.read(row.size))) for row in rows]


def _index(shards: Sequence[Path], rows: Sequence[_Row]) -> ShardIndex:
    key, shard, offset, size, label, crc32 = zip(*rows, strict=True)
    return ShardIndex(
        shard_names=np.array([path.name.encode() for path in shards]),
        shard_bytes=np.array([path.stat().st_size for path in shards], "<i8"),
        key=np.array(key),
        shard=np.array(shard, "<i4"),
        offset=np.array(offset, "<i8"),
        size=np.array(size, "<i4"),
        label=np.array(label, "<i4"),
        crc32=np.array(crc32, "<u4"),
    )
