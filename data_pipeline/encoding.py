"""What the worker processes of a preparation do: fetch, crop, encode."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_pipeline.decode import IMAGE_FORMATS
from data_pipeline.errors import DataError
from data_pipeline.parallel import ordered
from data_pipeline.pictures import SUFFIXES, Transform, UnreadableImageError, encode
from data_pipeline.samples import Samples

RUN = 8  # samples per message to a process: few enough that a hundred processes stay within a gigabyte of read-ahead
assert set(SUFFIXES.values()) <= set(IMAGE_FORMATS)


@dataclass(frozen=True)
class Output:
    """How samples are written; all of it decides the bytes."""

    image_format: str = "png"  # or jpeg, webp
    quality: int = 95  # of jpeg and webp, 1 to 100
    samples_per_shard: int = 4096  # at most
    shard_bytes: int = 256 * 2**20  # a shard is closed once it is this large
    seed: int = 0  # of the order in which samples are written
    limit: int | None = None  # samples per class, for trials

    def recipe(self) -> dict[str, str | int | float]:
        """What the data set records of it."""
        lossy = {} if self.image_format == "png" else {"quality": self.quality}
        limit = {} if self.limit is None else {"limit": self.limit}
        shards = {"samples_per_shard": self.samples_per_shard, "shard_bytes": self.shard_bytes, "seed": self.seed}
        return {"crop": "center, as in ADM", "format": self.image_format, **lossy, **shards, **limit}

    def check(self) -> None:
        """DataError where a value is out of its range."""
        if not 1 <= self.quality <= 100:
            raise DataError(f"quality is {self.quality}: give a number between 1 and 100.")
        if min(self.samples_per_shard, self.shard_bytes, 1 if self.limit is None else self.limit) < 1:
            raise DataError("samples per shard, bytes per shard and the limit per class must be 1 or more.")


class Encoded(NamedTuple):
    """One sample, ready to be written."""

    key: bytes
    label: int
    image: bytes  # a file
    sums: np.ndarray  # (C,) int64: of the pixels, before a lossy format changes them slightly
    squares: np.ndarray  # (C,) int64
    enlarged: bool  # the source was smaller than the resolution


class Broken(NamedTuple):
    """One sample that cannot be used, and why, as a sentence."""

    name: str
    why: str


@dataclass(frozen=True, eq=False)
class Encoder:
    """Positions of `samples` -> encoded samples."""

    samples: Samples
    transform: Transform | None  # None where the reader gives pixels
    image_format: str
    quality: int

    def __call__(self, positions: np.ndarray) -> list[Encoded | Broken]:
        return [self._one(position) for position in positions.tolist()]

    def _one(self, position: int) -> Encoded | Broken:
        samples, number = self.samples, int(self.samples.numbers[position])
        try:
            pixels, enlarged = self._pixels(samples.reader.read(number), number)
        except UnreadableImageError as error:
            return Broken(samples.reader.name(number), str(error))
        wide = pixels.reshape(len(pixels), -1).astype(np.int64)
        sums, squares = wide.sum(axis=1), (wide * wide).sum(axis=1)
        image = encode(pixels, self.image_format, self.quality)
        return Encoded(bytes(samples.keys[position]), int(samples.labels[position]), image, sums, squares, enlarged)

    def _pixels(self, raw: bytes | np.ndarray, number: int) -> tuple[np.ndarray, bool]:
        if isinstance(raw, np.ndarray):
            return raw, False
        assert self.transform is not None
        return self.transform(raw, self.samples.reader.name(number))


def encode_in_order(encoder: Encoder, order: np.ndarray, processes: int) -> Generator[Encoded | Broken]:
    """The samples at the positions `order` (N,), in that order whatever the number of processes."""
    runs: Sequence[np.ndarray] = [order[start : start + RUN] for start in range(0, len(order), RUN)]
    for run in ordered(encoder, runs, processes):
        yield from run
