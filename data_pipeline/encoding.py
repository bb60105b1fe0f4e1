"""What a preparation does with each sample: fetch, crop, encode.

Worker processes do all of it where images are written. Latents are encoded in this process, which has the
accelerator, from the pixels that the workers give.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_pipeline.decode import ARRAY, IMAGE_FORMATS, encode_npy
from data_pipeline.errors import DataError
from data_pipeline.latents import LatentOutput, moments
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
    latents: LatentOutput | None = None  # in the place of images

    @property
    def suffix(self) -> str:
        """Of an image or array inside a shard."""
        return SUFFIXES[self.image_format] if self.latents is None else ARRAY

    def recipe(self) -> dict[str, str | int | float]:
        """What the data set records of it."""
        lossy = {} if self.image_format == "png" else {"quality": self.quality}
        content = {"format": self.image_format, **lossy} if self.latents is None else self.latents.recipe()
        limit = {} if self.limit is None else {"limit": self.limit}
        shards = {"samples_per_shard": self.samples_per_shard, "shard_bytes": self.shard_bytes, "seed": self.seed}
        return {"crop": "center, as in ADM", **content, **shards, **limit}

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
    sums: np.ndarray  # (C,) int64: of the pixels, before a lossy format changes them slightly; of latents in parts
    squares: np.ndarray  # (C,) int64
    enlarged: bool  # the source was smaller than the resolution


class Picture(NamedTuple):
    """One sample whose pixels are still to be encoded."""

    key: bytes
    label: int
    pixels: np.ndarray  # uint8 (C, H, W)
    enlarged: bool


class Broken(NamedTuple):
    """One sample that cannot be used, and why, as a sentence."""

    name: str
    why: str


@dataclass(frozen=True, eq=False)
class Encoder:
    """Positions of `samples` -> encoded samples, or pictures where latents are to be made of them."""

    samples: Samples
    transform: Transform | None  # None where the reader gives pixels
    image_format: str | None  # None: pictures
    quality: int

    def __call__(self, positions: np.ndarray) -> list[Encoded | Picture | Broken]:
        return [self._one(position) for position in positions.tolist()]

    def _one(self, position: int) -> Encoded | Picture | Broken:
        samples, number = self.samples, int(self.samples.numbers[position])
        try:
            pixels, enlarged = self._pixels(samples.reader.read(number), number)
        except UnreadableImageError as error:
            return Broken(samples.reader.name(number), str(error))
        if samples.mirrored is not None and samples.mirrored[position]:
            pixels = np.ascontiguousarray(pixels[:, :, ::-1])
        picture = Picture(bytes(samples.keys[position]), int(samples.labels[position]), pixels, enlarged)
        return picture if self.image_format is None else _as_image(picture, self.image_format, self.quality)

    def _pixels(self, raw: bytes | np.ndarray, number: int) -> tuple[np.ndarray, bool]:
        if isinstance(raw, np.ndarray):
            return raw, False
        assert self.transform is not None
        return self.transform(raw, self.samples.reader.name(number))


def _as_image(picture: Picture, image_format: str, quality: int) -> Encoded:
    wide = picture.pixels.reshape(len(picture.pixels), -1).astype(np.int64)
    sums, squares = wide.sum(axis=1), (wide * wide).sum(axis=1)
    image = encode(picture.pixels, image_format, quality)
    return Encoded(picture.key, picture.label, image, sums, squares, picture.enlarged)


def _as_latents(run: Iterable[Encoded | Picture | Broken], output: LatentOutput) -> Generator[Encoded | Broken]:
    """The pictures of a run go through the encoder as one batch."""
    samples = list(run)
    pictures = [sample for sample in samples if isinstance(sample, Picture)]
    latents = iter(output.encode(np.stack([picture.pixels for picture in pictures])) if pictures else ())
    for sample in samples:
        if isinstance(sample, Picture):
            latent = next(latents)
            yield Encoded(sample.key, sample.label, encode_npy(latent), *moments(latent), sample.enlarged)
        else:
            yield sample


def encode_in_order(
    encoder: Encoder, order: np.ndarray, start: int, processes: int, latents: LatentOutput | None = None
) -> Generator[Encoded | Broken]:
    """The samples at the positions `order` (N,) from number `start` on, in that order for any number of processes.

    Batches of latents begin at the same places whatever the `start`, for the last bits of an encoder may depend on its
    batch.
    """
    first = start - start % RUN
    runs = [order[begin : begin + RUN] for begin in range(first, len(order), RUN)]
    done = start - first
    for run in ordered(encoder, runs, processes):
        usable = run if latents is None else _as_latents(run, latents)
        for place, sample in enumerate(usable):
            if place >= done:
                assert not isinstance(sample, Picture)
                yield sample
        done = 0
