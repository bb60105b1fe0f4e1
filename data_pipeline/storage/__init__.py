"""The one seam through which data sets are read and written: whole objects, byte ranges, sizes and lists by URL.

Plain paths, file://, http(s):// (read only) and s3:// URLs; gs:// and az:// go through the same library, untested.
Reads from stores survive failures: a request that fails, stalls, is cut short or answers for another object is repeated
from the byte that is missing, until nothing has arrived for `retry_budget_s`. Then, and for what no repetition mends,
they raise DataError, of which MissingError says that the object is not there or ends too early.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO

from data_pipeline.storage import local, objects
from data_pipeline.storage.clients import forget_clients
from data_pipeline.storage.remote import RemoteReader
from data_pipeline.storage.settings import Statistics, StorageSettings
from data_pipeline.storage.urls import expand, is_list, is_remote, join_url, local_path

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "StorageSettings",
    "configure",
    "delete",
    "exists",
    "forget",
    "is_remote",
    "join_url",
    "list_url",
    "local_path",
    "open_url",
    "read_pieces",
    "read_range",
    "read_ranges",
    "settings",
    "size_of",
    "sizes_in",
    "statistics",
    "write_object",
]

_statistics = Statistics()
_settings = StorageSettings()
_reader = RemoteReader(_settings, _statistics)


def configure(wanted: StorageSettings) -> None:
    """Read from stores in this way from now on. What was known of objects is forgotten, for they may have changed."""
    global _settings, _reader
    _reader.close()
    forget_clients()
    _settings, _reader = wanted, RemoteReader(wanted, _statistics)


def settings() -> StorageSettings:
    """How stores are read now. A process that reads for another is started with what `configure` takes from here."""
    return _settings


def statistics() -> dict[str, float]:
    """What this process has asked of stores so far: bytes read, requests, retries, seconds of all requests together."""
    return _statistics.snapshot()


def open_url(url: str) -> BinaryIO:
    """The whole object, opened for reading; DataError if it is not there."""
    return objects.open_object(_reader, url) if is_remote(url) else local.open_file(url)


def read_range(url: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`; MissingError if the object is missing or ends before them."""
    return read_ranges(url, [(offset, size)])[0]


def read_ranges(url: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """The byte ranges (offset, size) of one object, in parallel where it is far away; errors as of `read_range`."""
    return _reader.read_ranges(url, ranges) if is_remote(url) else local.read_ranges(url, ranges)


def read_pieces(url: str, offset: int, size: int) -> Iterator[Buffer]:
    """`size` bytes from `offset` piece by piece as they arrive, from one request; errors as of `read_range`."""
    if is_remote(url):
        yield from _reader.read_pieces(url, (offset, size))
    else:
        yield from local.read_ranges(url, [(offset, size)])


def size_of(url: str) -> int:
    """Size of the object in bytes; MissingError if it is not there."""
    return _reader.size_of(url) if is_remote(url) else local.size_of(url)


def sizes_in(url: str) -> dict[str, int] | None:
    """Bytes of the files or objects right in the folder `url`, by name; None where the store keeps no list for us."""
    return objects.sizes_in(_reader, url) if is_remote(url) else local.sizes_in(url)


def exists(url: str) -> bool:
    """Whether there is an object of this name, or on this machine a folder."""
    return _reader.exists(url) if is_remote(url) else local_path(url).exists()


def list_url(url: str) -> list[str]:
    """The URLs that `url` names: a list with braces (`{000000..000999}`) or `::`, else what lies in the folder, sorted.

    A folder that is not there is empty. A web server has no folders, so its URL stands for itself.
    """
    if is_list(url):
        return expand(url)
    return objects.list_folder(_reader, url) if is_remote(url) else local.list_folder(url)


def write_object(url: str, content: BinaryIO | bytes) -> None:
    """Write a whole object, which is complete or absent; DataError if it cannot be written."""
    if not is_remote(url):
        local.write_file(url, content)
        return
    _reader.forget(url)
    objects.write_object(_settings, _statistics, url, content)


def forget(url: str) -> None:
    """The object is not what it should be: look at it anew when it is read next. Files are always looked at."""
    _reader.forget(url)


def delete(urls: Sequence[str]) -> None:
    """Remove files or objects, of which some may be gone already; DataError if a store does not let us."""
    for url in (remote := [url for url in urls if is_remote(url)]):
        _reader.forget(url)
    objects.delete(_reader, remote)
    local.delete(url for url in urls if not is_remote(url))


@atexit.register
def _close() -> None:
    _reader.close()
