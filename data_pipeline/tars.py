"""Where the members of a tar lie, from one scan of its headers; nothing is ever extracted to disk.

Archives inside archives are scanned where they are: ImageNet's is a tar of a thousand tars.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_pipeline.errors import DataError
from data_pipeline.ranged_file import RangedFile


class Member(NamedTuple):
    """A plain file inside an archive."""

    name: str
    offset: int  # of its content, from the start of the outermost file
    size: int


def scan(path: Path, within: Member | None = None) -> Iterator[Member]:
    """The plain files of the tar `path`, or of the tar that is its member `within`, in their order.

    DataError where it is no tar, is damaged, or ends before its end marker.
    """
    name = str(path) if within is None else f"{path}: {within.name}"
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        start, size = (0, os.fstat(descriptor).st_size) if within is None else (within.offset, within.size)
        file = RangedFile(size, lambda offset, count: os.pread(descriptor, count, start + offset))
        for member in scan_file(file, name):
            if member.offset + member.size > size:
                raise cut_short(name)
            yield member._replace(offset=start + member.offset)
    finally:
        os.close(descriptor)


def scan_file(file: io.RawIOBase | BinaryIO, name: str, *, seekable: bool = True) -> Iterator[Member]:
    """The plain files of an open uncompressed tar; one that is not seekable is read from start to end."""
    try:
        with tarfile.open(fileobj=file, mode="r:" if seekable else "r|") as tar:  # type: ignore[call-overload]
            while header := tar.next():
                tar.members = []  # or it would remember each of a million headers
                if header.isreg():
                    yield Member(header.name, header.offset_data, header.size)
            if seekable:
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise cut_short(name)
    except (tarfile.TarError, UnicodeError, ValueError, OverflowError) as error:
        raise DataError(f"{name} is damaged or not a tar ({error}): get it again.") from error


def cut_short(name: str) -> DataError:
    return DataError(f"{name} was cut short: get it again, and compare its size with the one published.")


def is_tar(path: Path) -> bool:
    """Whether a file starts with a plausible tar header."""
    with path.open("rb") as file:
        try:
            tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return False
    return True
