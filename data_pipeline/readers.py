"""Random access to images where they lie. Processes get a copy, so a reader is cheap to send and holds nothing open."""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.storage import read_range


class Reader(Protocol):
    """Random access to a source, which the processes that encode share."""

    def read(self, number: int) -> bytes | np.ndarray:
        """An encoded image file, or pixels uint8 (C, H, W) to be stored as they are; DataError if it is gone."""
        ...

    def name(self, number: int) -> str:
        """What people know the sample by."""
        ...


@dataclass(frozen=True, eq=False)
class ArrayReader:
    """Images that are in memory."""

    images: np.ndarray  # uint8 (N, C, H, W)
    source: str

    def read(self, number: int) -> np.ndarray:
        return self.images[number]

    def name(self, number: int) -> str:
        return f"{self.source}: image {number}"


@dataclass(frozen=True)
class FileReader:
    """Ordinary files below a folder."""

    root: Path
    names: tuple[str, ...]  # relative to it, with /

    def read(self, number: int) -> bytes:
        try:
            return (self.root / self.names[number]).read_bytes()
        except OSError as error:
            raise DataError(f"{self.name(number)} cannot be read ({error.strerror}): check the source.") from error

    def name(self, number: int) -> str:
        return str(self.root / self.names[number])


@dataclass(frozen=True, eq=False)
class MemberReader:
    """Members of one large local archive, each read by its place."""

    archive: Path
    names: np.ndarray  # (N,) bytes
    offsets: np.ndarray  # (N,) int64: first byte of the content
    sizes: np.ndarray  # (N,) int64

    def read(self, number: int) -> bytes:
        size = int(self.sizes[number])
        try:
            data = os.pread(_descriptor(self.archive), size, int(self.offsets[number]))
        except OSError as error:
            raise DataError(f"{self.archive} cannot be read ({error.strerror}): check the source.") from error
        if len(data) != size:
            raise DataError(f"{self.archive} was cut short while it was read: put it back and repeat the command.")
        return data

    def name(self, number: int) -> str:
        return f"{self.archive}: {os.fsdecode(self.names[number])}"


@dataclass(frozen=True, eq=False)
class RangeReader:
    """Byte ranges of files or objects."""

    urls: tuple[str, ...]
    shard: np.ndarray  # (N,) int32: which of the urls
    offsets: np.ndarray  # (N,) int64
    sizes: np.ndarray  # (N,) int64
    names: np.ndarray  # (N,) bytes

    def read(self, number: int) -> bytes:
        return read_range(self.urls[self.shard[number]], int(self.offsets[number]), int(self.sizes[number]))

    def name(self, number: int) -> str:
        return f"{self.urls[self.shard[number]]}: {self.names[number].decode('utf-8', 'replace')}"


@lru_cache(maxsize=8)
def _descriptor(path: Path) -> int:
    """Open for the life of the process; a preparation has two archives at most."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
