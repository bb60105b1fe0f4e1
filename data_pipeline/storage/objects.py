"""What else is done with the objects of stores: opening them as files, listing and writing them."""

import io
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import BinaryIO

import obstore

from data_pipeline.errors import DataError, DeniedError
from data_pipeline.ranged_file import RangedFile
from data_pipeline.storage.clients import Client, client_of
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


def sizes_in(reader: RemoteReader, url: str) -> dict[str, int] | None:
    """Bytes of the objects right below the URL, by name, out of the store's list; None where nobody tells.

    A request brings a thousand of them, where asking for each would take a thousand requests.
    """
    scheme, _, name = split_remote(url)
    if scheme.startswith("http"):
        return None
    prefix = name.rstrip("/")
    try:
        found = reader.ask(url, lambda client: obstore.list_with_delimiter(client, prefix))
    except DeniedError:
        return None  # reading objects and listing them are two rights
    return {meta["path"].rpartition("/")[2]: meta["size"] for meta in found["objects"]}


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


def delete(reader: RemoteReader, urls: Iterable[str]) -> None:
    """Remove objects, many by one request where the store can; those that are gone already are no error."""
    by_place: defaultdict[str, list[str]] = defaultdict(list)
    for url in urls:
        _refuse_web_server(url, "deleted")
        scheme, place, _ = split_remote(url)
        by_place[f"{scheme}://{place}/"].append(object_name(url))
    for place, names in by_place.items():
        reader.ask(place, partial(_delete, names=names), done="deleted")


def _delete(client: Client, names: list[str]) -> None:
    try:
        obstore.delete(client, names)
    except FileNotFoundError:
        for name in names:  # one by one, since it is not known which of the others were reached
            with suppress(FileNotFoundError):
                obstore.delete(client, name)


def write_object(settings: StorageSettings, statistics: Statistics, url: str, content: BinaryIO | bytes) -> None:
    """Write an object, which is complete or absent. The transport repeats what failed, part by part."""
    _refuse_web_server(url, "written")
    client, name = client_of(url, settings, writing=True), object_name(url)
    try:
        with statistics.request():
            obstore.put(client, name, content, chunk_size=UPLOAD_PART_BYTES, max_concurrency=UPLOAD_PARALLEL)
        return
    except TRANSPORT_ERRORS as error:
        failure = failure_of(error)
    raise failure.error(url, done="written")  # outside of `except`: the transport's error quotes what was sent


def _refuse_web_server(url: str, done: str) -> None:
    if split_remote(url)[0].startswith("http"):
        raise DataError(f"{shown(url)} cannot be {done}: web servers are only read, so use a folder or a bucket.")
