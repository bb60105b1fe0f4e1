"""What else is done with the objects of stores: opening them as files, listing and writing them."""

import io
from typing import BinaryIO

import obstore

from data_pipeline.errors import DataError
from data_pipeline.storage.clients import client_of
from data_pipeline.storage.failures import TRANSPORT_ERRORS, failure_of
from data_pipeline.storage.remote import RemoteReader
from data_pipeline.storage.settings import Statistics, StorageSettings
from data_pipeline.storage.urls import object_name, shown, split_remote

AHEAD_BYTES = 32 * 2**20  # of an object that is read from its beginning to its end
UPLOAD_PART_BYTES = 16 * 2**20
UPLOAD_PARALLEL = 4


class _RemoteFile(io.RawIOBase):
    """An object as an unbuffered file that can seek."""

    def __init__(self, reader: RemoteReader, url: str):
        self._reader, self._url = reader, url
        self._size = reader.size_of(url)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"negative seek position {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        data = self._take(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._take(self._size)

    def _take(self, most: int) -> bytes:
        size = max(min(most, self._size - self._position), 0)
        data = self._reader.read_ranges(self._url, [(self._position, size)])[0] if size else b""
        self._position += size
        return data


def open_object(reader: RemoteReader, url: str) -> BinaryIO:
    """The object as a buffered file; it is read in large steps, each by several requests at once."""
    raw = _RemoteFile(reader, url)
    return io.BufferedReader(raw, buffer_size=max(min(raw._size, AHEAD_BYTES), 1))


def list_folder(reader: RemoteReader, url: str) -> list[str]:
    """What lies below the URL, folders and objects, sorted; the object itself if it is one."""
    scheme, place, name = split_remote(url)
    prefix = name.rstrip("/")
    if scheme.startswith("http"):
        return [url]  # web servers have no list to ask for
    found = reader.ask(url, lambda client: obstore.list_with_delimiter(client, prefix))
    names = [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]
    if not names:
        return [url] if prefix and reader.exists(url.rstrip("/")) else []
    return sorted(f"{scheme}://{place}/{name}" for name in names)


def write_object(settings: StorageSettings, statistics: Statistics, url: str, content: BinaryIO | bytes) -> None:
    """Write an object, which is complete or absent. The transport repeats what failed, part by part."""
    if split_remote(url)[0].startswith("http"):
        raise DataError(f"{shown(url)} cannot be written: web servers are only read, so write to a folder or a bucket.")
    client, name = client_of(url, settings, writing=True), object_name(url)
    try:
        with statistics.request():
            obstore.put(client, name, content, chunk_size=UPLOAD_PART_BYTES, max_concurrency=UPLOAD_PARALLEL)
        return
    except TRANSPORT_ERRORS as error:
        failure = failure_of(error)
    raise failure.error(url, done="written")  # outside of `except`: the transport's error quotes what was sent
