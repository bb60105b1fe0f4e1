"""Files of this machine.

Byte ranges go through `os.pread` on a few cached descriptors, so reading one sample costs one system call and threads
share no offset.
"""

import os
import shutil
import uuid
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from data_pipeline.errors import PREPARE_AGAIN, DataError, MissingError
from data_pipeline.storage.urls import join_url, local_path

OPEN_DESCRIPTORS = 64  # per process; far below the usual limit of 1,024


def open_file(url: str) -> BinaryIO:
    """The file, opened for reading."""
    try:
        return local_path(url).open("rb")
    except OSError as error:
        raise _unreadable(url, error) from error


def read_ranges(url: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """The byte ranges (offset, size) of a file."""
    try:
        descriptor = _descriptor(url)
        parts = [descriptor.read(offset, size) for offset, size in ranges]
    except OSError as error:
        raise _unreadable(url, error) from error
    for (offset, size), part in zip(ranges, parts, strict=True):
        if len(part) != size:
            raise MissingError(f"{url} ends before byte {offset + size}, so it was cut short: {PREPARE_AGAIN}.")
    return parts


def size_of(url: str) -> int:
    """Size of the file in bytes."""
    try:
        return local_path(url).stat().st_size
    except OSError as error:
        raise _unreadable(url, error) from error


def sizes_in(url: str) -> dict[str, int]:
    """Bytes of the files right in a folder, by name."""
    try:
        with os.scandir(local_path(url)) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    except OSError as error:
        raise _unreadable(url, error) from error


def list_folder(url: str) -> list[str]:
    """What lies in a folder, sorted; the file itself for a file; nothing where there is nothing."""
    path = local_path(url)
    try:
        if path.is_dir():
            return sorted(join_url(url, entry.name) for entry in path.iterdir())
    except OSError as error:
        raise _unreadable(url, error) from error
    return [url] if path.exists() else []


def write_file(url: str, content: BinaryIO | bytes) -> None:
    """Write a file that is complete or absent."""
    path = local_path(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with partial.open("wb") as file:
            file.write(content) if isinstance(content, bytes) else shutil.copyfileobj(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise DataError(f"{url} cannot be written ({error.strerror}): check the disk and its permissions.") from error
    finally:
        partial.unlink(missing_ok=True)
        _descriptor.cache_clear()  # or the old file would be read on


def sync_folder(folder: Path) -> None:
    """Make the names inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete(urls: Iterable[str]) -> None:
    """Remove files that are there."""
    for url in urls:
        try:
            local_path(url).unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"{url} cannot be deleted ({error.strerror}): check its permissions.") from error
    _descriptor.cache_clear()  # what is written under these names later is another file


class _Descriptor:
    """An open file that closes with its last reference, so eviction cannot close it under a reading thread."""

    def __init__(self, path: Path):
        self._fd = -1
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._fd, size, offset)

    def __del__(self):
        if self._fd >= 0:
            os.close(self._fd)


@lru_cache(maxsize=OPEN_DESCRIPTORS)
def _descriptor(url: str) -> _Descriptor:
    return _Descriptor(local_path(url))


def _unreadable(url: str, error: OSError) -> DataError:
    if isinstance(error, FileNotFoundError):
        return MissingError(f"{url} does not exist: check the path, or {PREPARE_AGAIN}.")
    return DataError(f"{url} cannot be read ({error.strerror}): check the path and its permissions.")
