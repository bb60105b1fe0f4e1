"""One index per split: a numpy archive that says where every sample lies.

One row is one sample is one contiguous byte range of a tar shard, so random access needs no tar scan. All work on the
columns is vectorised: ImageNet's 1.28 million rows load in well under a second.
"""

import hashlib
import io
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import IO, Self

import numpy as np

from data_pipeline.description import is_plain_name
from data_pipeline.errors import PREPARE_AGAIN, DamagedError
from data_pipeline.looks import look_again
from data_pipeline.storage import is_remote, open_url

SPAN_BYTES = 4 * 2**20  # about how much one request to a store brings; it decides the order, so it is no option
TAR_BLOCK = 512  # bytes; every header and body of a tar starts on such a boundary
_NOT_AN_ARCHIVE = (  # what numpy and zipfile raise for files that are something else, damaged or lying about sizes
    *(OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, MemoryError),
    *(zlib.error, zipfile.BadZipFile, struct.error, SyntaxError, tokenize.TokenError),
)
_TYPES = {  # what the name of each column's numpy type starts with
    "shard_names": "|S",
    "shard_bytes": "<i8",
    "key": "|S",
    "shard": "<i4",
    "offset": "<i8",
    "size": "<i4",
    "label": "<i4",
    "crc32": "<u4",
}


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Columns over S shards and N samples; samples are ordered by shard, then by offset."""

    shard_names: np.ndarray  # (S,) bytes: file names beside the index
    shard_bytes: np.ndarray  # (S,) int64: size of each shard file
    key: np.ndarray  # (N,) bytes: name of the sample inside its shard, without suffix
    shard: np.ndarray  # (N,) int32: row of shard_names
    offset: np.ndarray  # (N,) int64: first byte inside the shard
    size: np.ndarray  # (N,) int32: bytes, tar headers and padding included
    label: np.ndarray  # (N,) int32: class number
    crc32: np.ndarray  # (N,) uint32: of the byte range

    def __len__(self) -> int:
        return len(self.key)

    @classmethod
    def of_shard(
        cls,
        name: str,
        total_bytes: int,
        *,
        keys: Sequence[bytes],
        labels: Sequence[int],
        sizes: Sequence[int],
        checksums: Sequence[int],
    ) -> Self:
        """The index of one shard, whose samples follow each other without a gap."""
        size = np.array(sizes, "<i4")
        return cls(
            shard_names=np.array([name.encode()]),
            shard_bytes=np.array([total_bytes], "<i8"),
            key=np.array(keys),
            shard=np.zeros(len(keys), "<i4"),
            offset=np.cumsum(size, dtype="<i8") - size,
            size=size,
            label=np.array(labels, "<i4"),
            crc32=np.array(checksums, "<u4"),
        )

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The index of several shards, out of the index of each."""
        names = [field.name for field in fields(cls) if field.name != "shard"]
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return cls(shard=np.repeat(np.arange(len(parts), dtype="<i4"), [len(part) for part in parts]), **columns)

    @property
    def shard_counts(self) -> np.ndarray:
        """Samples in each shard (S,) int64."""
        return np.bincount(self.shard, minlength=len(self.shard_names))

    @cached_property
    def span_starts(self) -> np.ndarray:
        """First samples of the spans, then N: (M + 1,) int64.

        A span is a run of samples of one shard that start in the same SPAN_BYTES of it; it holds at least one sample.
        """
        block = self.offset // SPAN_BYTES
        same = (self.shard[1:] == self.shard[:-1]) & (block[1:] == block[:-1])
        return np.concatenate([[0], np.flatnonzero(~same) + 1, [len(self)]])

    @property
    def span_counts(self) -> np.ndarray:
        """Samples in each span (M,) int64."""
        return np.diff(self.span_starts)

    @property
    def mean_bytes(self) -> float:
        """Of a sample, tar headers and padding included."""
        return float(self.size.mean(dtype=np.float64))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over all columns, their types and lengths: equal exactly where the samples and their places are."""
        digest = hashlib.sha256()
        for name, column in self._columns().items():
            digest.update(f"{name}:{column.dtype.str}:{len(column)};".encode())
            digest.update(np.ascontiguousarray(column).data.cast("B"))
        return digest.hexdigest()

    def shard_name(self, sample_id: int) -> str:
        return self.shard_names[self.shard[sample_id]].decode()

    def save(self, file: IO[bytes]) -> None:
        """Write the columns; the same columns give the same bytes."""
        np.savez(file, allow_pickle=False, **self._columns())

    def encoded(self) -> bytes:
        """What `save` writes."""
        buffer = io.BytesIO()
        self.save(buffer)
        return buffer.getvalue()

    def _columns(self) -> dict[str, np.ndarray]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def load_index(url: str) -> ShardIndex:
    """Read and check an index; DataError where it is missing, damaged or claims what cannot be."""
    return look_again([url], lambda: _checked(url))


def _checked(url: str) -> ShardIndex:
    try:
        with _opened(url) as file, np.load(file, allow_pickle=False) as archive:
            index = ShardIndex(**{name: archive[name] for name in _TYPES})
    except _NOT_AN_ARCHIVE as error:
        raise DamagedError(f"{url} is not a readable index ({type(error).__name__}): {PREPARE_AGAIN}.") from error
    problem = _problem(index)
    if problem:
        raise DamagedError(f"{url} is not a valid index ({problem}): {PREPARE_AGAIN}.")
    return index


def _opened(url: str) -> IO[bytes]:
    """Archives are read from their end, then here and there: of an object that would be a request each time."""
    file = open_url(url)
    if not is_remote(url):
        return file
    with file:
        return io.BytesIO(file.read())


def _problem(index: ShardIndex) -> str | None:
    """The first thing wrong with an index, or None. Later checks rely on earlier ones."""
    for name, type_name in _TYPES.items():
        column = getattr(index, name)
        if not isinstance(column, np.ndarray) or column.ndim != 1 or not column.dtype.str.startswith(type_name):
            return f"column {name} has the wrong type"
    return _length_problem(index) or _name_problem(index) or _range_problem(index)


def _length_problem(index: ShardIndex) -> str | None:
    if len(index.shard_names) != len(index.shard_bytes) or not len(index):
        return "it is empty or its columns differ in length"
    if any(len(column) != len(index) for column in (index.shard, index.offset, index.size, index.label, index.crc32)):
        return "its columns differ in length"
    return None


def _name_problem(index: ShardIndex) -> str | None:
    names = [name.decode("ascii", "replace") for name in index.shard_names.tolist()]
    bad = next((name for name in names if not (name.isascii() and is_plain_name(name))), None)
    if bad is not None:
        return f"{bad!r} is not a plain file name"
    return "a shard is named twice" if len(set(names)) != len(names) else None


def _range_problem(index: ShardIndex) -> str | None:
    shard, offset, size = index.shard, index.offset, index.size
    if shard.min() < 0 or shard.max() >= len(index.shard_names):
        return "a sample names a shard that is not listed"
    if size.min() <= 0 or offset.min() < 0 or (size % TAR_BLOCK).any() or (offset % TAR_BLOCK).any():
        return "a sample's byte range is impossible"
    if index.shard_bytes.min() < 0 or (offset > index.shard_bytes[shard] - size).any():  # nothing here can overflow
        return "a sample's byte range ends outside its shard"
    same_shard = shard[1:] == shard[:-1]
    if (shard[1:] < shard[:-1]).any() or (same_shard & (offset[1:] - offset[:-1] < size[:-1])).any():
        return "samples overlap or are out of order"
    return "a label is negative" if index.label.min() < 0 else None
