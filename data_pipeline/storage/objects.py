"""What else is done with the objects of stores: opening them as files, listing and writing them."""

import io
from typing import BinaryIO

import obstore

from data_pipeline.errors import DataError
from data_pipeline.ranged_file import RangedFile
from data_pipeline.storage.clients import client_of
from data_pipeline.storage.failures import TRANSPORT_ERRORS, failure_of
from data_pipeline.storage.remote import RemoteReader
from data_pipeline.storage.settings import Statistics, StorageSettings
from data_pipeline.storage.urls import object_name, shown, split_remote

AHEAD_BYTES = 32 * 2**20  # of an object that is read from its beginning to its end
UPLOAD_PART_BYTES = 16 * 2**20
UPLOAD_PARALLEL = 4


def open_object(reader: RemoteReader, url: str) -> BinaryIO:
    """The object as a buffered file; it is read in large steps, each by several requests at once."""
    raw = RangedFile(reader.size_of(url), lambda offset, count: reader.read_ranges(url, [(offset, count)])[0])
    return io.BufferedReader(raw, buffer_size=max(min(raw.size, AHEAD_BYTES), 1))


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
