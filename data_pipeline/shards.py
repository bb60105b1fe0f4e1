"""Writing one split: samples -> `SPLIT-000000.tar`, ... and their index.

Samples are shuffled across classes with a fixed seed, and everything that could differ between two writings (times,
owners, order) is fixed, so the same input gives the same bytes. Plain webdataset opens the shards too. Shards that an
interrupted writing finished are kept, and only the rest is written.
"""

import os
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from webdataset.writer import TarWriter

from data_pipeline.decode import LABEL
from data_pipeline.encoding import Broken, Encoded, Encoder, Output, encode_in_order
from data_pipeline.errors import DataError
from data_pipeline.index import ShardIndex
from data_pipeline.order import random_bits, random_permutation
from data_pipeline.records import FinishedShard, ShardRecord, Target, file_crc32, sync


class Bar(Protocol):
    """What tqdm gives."""

    def update(self, n: int, /) -> object: ...
    def close(self) -> object: ...


Progress: TypeAlias = Callable[[str, int, int], Bar]  # (split, samples in all, samples done) -> a bar


class _NoBar:
    def update(self, n: int, /) -> None: ...
    def close(self) -> None: ...


def quiet(split: str, total: int, done: int) -> Bar:
    """The progress that nobody watches."""
    return _NoBar()


@dataclass(frozen=True)
class Job:
    """How a data set is written, none of which changes a byte, but that `skip_broken` leaves out what is broken."""

    processes: int = 1
    skip_broken: bool = False
    progress: Progress = quiet


@dataclass(frozen=True, eq=False)
class WrittenSplit:
    """What was written, and what was met on the way."""

    index: ShardIndex
    sums: np.ndarray  # (C,) int64: of all pixels, of latents in parts
    squares: np.ndarray  # (C,) int64
    skipped: list[str]  # names of unreadable samples
    enlarged: int  # samples that were smaller than the resolution


def write_split(target: Target, split: str, encoder: Encoder, output: Output, job: Job) -> WrittenSplit:
    """Write one split to `target`, or the rest of it; DataError if an image is unreadable and not to be skipped."""
    finished = list(_finished(target, split))
    order = random_permutation(random_bits(output.seed, 0), len(encoder.samples))
    done = finished[-1].record.end if finished else 0
    bar = job.progress(split, len(order), done)
    encoded = encode_in_order(encoder, order, done, job.processes, output.latents)
    stream = _Usable(encoded, done, job.skip_broken, bar)
    try:
        for first in stream:
            name = shard_name(split, len(finished))
            full = islice(chain([first], stream), output.samples_per_shard)
            finished.append(_write_shard(target.folder / f"{name}.part", name, full, stream, output))
            target.keep(target.folder / f"{name}.part", finished[-1])
    finally:
        stream.close()
    if not finished:
        raise DataError(f"none of the {len(order)} images of {split} is readable: check the source.")
    return _written(finished, stream.skipped)


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def index_name(split: str) -> str:
    return f"index-{split}.npz"


def _finished(target: Target, split: str) -> Iterator[FinishedShard]:
    """The shards that are there already, up to the first that is not."""
    number = 0
    while shard := target.finished(shard_name(split, number)):
        yield shard
        number += 1


class _Usable(Iterator[Encoded]):
    """The samples that can be written; knows where it is, and which samples it has left out since it was last asked."""

    def __init__(self, samples: Generator[Encoded | Broken], position: int, skip_broken: bool, bar: Bar):
        self._samples, self._skip_broken, self._bar = samples, skip_broken, bar
        self.position = position  # in the order, after the last sample that was taken
        self.skipped: list[str] = []

    def __next__(self) -> Encoded:
        while True:
            sample = next(self._samples)
            self.position += 1
            self._bar.update(1)
            if isinstance(sample, Encoded):
                return sample
            if not self._skip_broken:
                raise DataError(sample.why)
            self.skipped.append(sample.name)

    def take_skipped(self) -> list[str]:
        skipped, self.skipped = self.skipped, []
        return skipped

    def close(self) -> None:
        """End the processes behind it."""
        self._bar.close()
        self._samples.close()


@dataclass
class _Totals:
    """Sums over the samples of one shard."""

    sums: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    enlarged: int = 0

    def add(self, sample: Encoded) -> None:
        self.sums, self.squares = self.sums + sample.sums, self.squares + sample.squares
        self.enlarged += sample.enlarged


def _write_shard(path: Path, name: str, samples: Iterable[Encoded], stream: _Usable, output: Output) -> FinishedShard:
    """Write samples up to a full shard to `path`; the checksums are of what can be read back from it."""
    keys, labels, sizes, totals = [], [], [], _Totals()
    with path.open("w+b") as file:
        with TarWriter(file, encoder=False, mtime=0) as tar:
            for sample in samples:
                start = tar.tarstream.offset
                label = str(sample.label).encode()
                tar.write({"__key__": sample.key.decode("ascii"), output.suffix: sample.image, LABEL: label})
                keys.append(sample.key)
                labels.append(sample.label)
                sizes.append(tar.tarstream.offset - start)
                totals.add(sample)
                if tar.tarstream.offset >= output.shard_bytes:
                    break
        sync(file)
        file.seek(0)
        checksums = [zlib.crc32(file.read(size)) for size in sizes]
        total_bytes = file.seek(0, os.SEEK_END)
    index = ShardIndex.of_shard(name, total_bytes, keys=keys, labels=labels, sizes=sizes, checksums=checksums)
    record = ShardRecord(
        crc32=file_crc32(path),
        end=stream.position,
        sums=totals.sums.tolist(),
        squares=totals.squares.tolist(),
        skipped=stream.take_skipped(),
        enlarged=totals.enlarged,
        fingerprint=index.fingerprint,
    )
    return FinishedShard(record, index)


def _written(finished: list[FinishedShard], skipped_last: list[str]) -> WrittenSplit:
    parts, records = [shard.index for shard in finished], [shard.record for shard in finished]
    return WrittenSplit(
        index=ShardIndex.joined(parts),
        sums=np.sum([record.sums for record in records], axis=0),
        squares=np.sum([record.squares for record in records], axis=0),
        skipped=[name for record in records for name in record.skipped] + skipped_last,
        enlarged=sum(record.enlarged for record in records),
    )
