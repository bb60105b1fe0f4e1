"""The one seam through which data sets are read: whole files, byte ranges and sizes by URL.

Plain paths and file:// URLs today; object storage belongs behind these same functions. Byte ranges of local files go
through `os.pread` on a few cached descriptors, so reading one sample costs one system call and threads share no offset.
"""

import io
import os
import re
import shutil
import threading
import uuid
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from data_pipeline.errors import PREPARE_AGAIN, DataError, MissingError

_counts: Counter[str] = Counter()
_counting = threading.Lock()
OPEN_DESCRIPTORS = 64  # per process; far below the usual limit of 1,024


def open_url(url: str) -> BinaryIO:
    """The whole object, opened for reading; DataError if it is not there."""
    if is_remote(url):
        return io.BytesIO(_http(url))
    try:
        return local_path(url).open("rb")
    except OSError as error:
        raise _unreadable(url, error) from error


def read_range(url: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`; DataError if the object is missing or ends before them."""
    if is_remote(url):
        return _http(url, offset, size)
    try:
        data = _descriptor(url).read(offset, size)
    except OSError as error:
        raise _unreadable(url, error) from error
    if len(data) != size:
        raise MissingError(f"{url} ends before byte {offset + size}, so it was cut short: {PREPARE_AGAIN}.")
    return data


def read_ranges(url: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """The byte ranges (offset, size) of one object; errors as of `read_range`."""
    return [read_range(url, offset, size) for offset, size in ranges]


def is_remote(url: str) -> bool:
    """Whether the URL names something that is not on this machine."""
    return "://" in url and not url.startswith("file://")


def statistics() -> dict[str, float]:
    """What this process has asked of stores so far: bytes, requests, retries."""
    return dict(_counts)


def _http(url: str, offset: int = 0, size: int | None = None) -> bytes:
    """An object, or a part of it, from a web server."""
    if not url.startswith(("http://", "https://")):
        local_path(url)
    asked = {} if size is None else {"Range": f"bytes={offset}-{offset + size - 1}"}
    try:
        with urlopen(Request(url, headers=asked), timeout=60) as answer:
            data = answer.read()
    except HTTPError as error:
        error.close()
        problem = MissingError if error.code in (404, 410, 416) else DataError
        raise problem(f"{url} cannot be read (HTTP {error.code}): check the address, or {PREPARE_AGAIN}.") from error
    except OSError as error:
        raise DataError(f"{url} cannot be read ({error}): check the address and the network.") from error
    with _counting:
        _counts.update(requests=1, bytes=len(data))
    if size is not None and len(data) != size:
        raise MissingError(f"{url} ends before byte {offset + size}, so it was cut short: {PREPARE_AGAIN}.")
    return data


def size_of(url: str) -> int:
    """Size of the object in bytes; DataError if it is not there."""
    try:
        return local_path(url).stat().st_size
    except OSError as error:
        raise _unreadable(url, error) from error


def exists(url: str) -> bool:
    """Whether there is an object of this name."""
    return local_path(url).exists()


def list_url(url: str) -> list[str]:
    """The URLs of what lies in the folder `url`, sorted; nothing where there is none."""
    folder = local_path(url)
    return sorted(join_url(url, path.name) for path in folder.iterdir()) if folder.is_dir() else []


def is_remote(url: str) -> bool:
    """Whether the URL names something that is not on this machine."""
    return "://" in url and not url.startswith("file://")


def write_object(url: str, content: BinaryIO | bytes) -> None:
    """Write a whole object, which is complete or absent."""
    path = local_path(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with partial.open("wb") as file:
        file.write(content) if isinstance(content, bytes) else shutil.copyfileobj(content, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def join_url(base: str, name: str) -> str:
    """The URL of `name` inside the folder `base`."""
    return f"{base.rstrip('/')}/{name}"


def local_path(url: str) -> Path:
    """The path behind a plain path or a file:// URL; DataError for every other scheme."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", url)
    if scheme is None:
        return Path(url).expanduser()
    parts = urlsplit(url)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise DataError(f"{url} is not on this machine: give a plain path or a file:///absolute/path URL instead.")
    return Path(unquote(parts.path))


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
