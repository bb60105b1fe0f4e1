"""A folder of spans on this machine, shared by all processes that read data sets from a store.

One file per span, complete or absent, written by whoever holds the lock on its `.part` file; the lock ends with the
process, so a killed one leaves no claim. What was used longest ago is removed first. Checksums are the reader's: it
drops what it finds spoiled.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data_pipeline.errors import DataError

if TYPE_CHECKING:
    from typing_extensions import Buffer

PATIENCE = 60.0  # seconds: how long another process may take to fetch a span before we fetch it ourselves
POLL = 0.005
TOUCH = 10.0  # seconds between two notes of use, per process and span
KEEP = 0.9  # of the limit is left when room is made, so that it is seldom made
_ENTRY = re.compile(r"\d+(\.part)?")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheOptions:
    """Where spans of remote data sets are kept, and how much of them."""

    folder: str | None = None  # None: one for this user in the system's folder of temporary files
    limit: int = 16 * 2**30  # bytes; 0 keeps nothing


class _Entry(NamedTuple):
    used: float  # when
    size: int
    path: str


class SpanCache:
    """The spans of one data set inside the shared folder. Any number of processes and threads may use it at once."""

    def __init__(self, options: CacheOptions, owner: str):
        """`owner`: a name for the data set's exact content; DataError if the folder cannot be used."""
        assert re.fullmatch(r"[0-9a-f]+(-\d+)?", owner) and options.limit > 0
        self._root = _root(options)
        self._limit = options.limit
        self._folder = self._root / owner
        self._touched: dict[int, float] = {}
        self._counting = threading.Lock()
        self.counts = {"fetched": 0, "evicted": 0, "spoiled": 0}
        self.is_full = False  # the disk is: nothing more will be kept by this process
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise _unusable(self._root, error) from error

    def read(self, span: int, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """The parts (offset, size) of a span, or None if it is not here. A damaged entry may give less."""
        try:
            descriptor = os.open(self._path(span), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            self._touch(span, descriptor)
            return [os.pread(descriptor, size, offset) for offset, size in ranges]
        finally:
            os.close(descriptor)

    def fill(self, span: int, size: int, load: Callable[[], Iterable[Buffer]], *, wait: bool = True) -> bool:
        """Let one process write the `size` bytes that `load` brings of a missing span. Errors of `load` pass.

        False if it cannot be kept; else it is here by now or, with `wait` off, another process may still be loading it.
        """
        if size > self._limit or self.is_full:
            return False
        claim = self._claim(span, wait)
        if claim is None:
            return True
        if claim < 0:
            return False
        part = f"{self._path(span)}.part"
        try:
            return self._store(claim, span, size, load)
        finally:
            if _is_same(claim, part):
                os.unlink(part)
            os.close(claim)

    def drop(self, span: int) -> None:
        """Forget a spoiled entry; several samples may have found it so."""
        if self._path(span).exists():
            self._count("spoiled")
            self._path(span).unlink(missing_ok=True)

    def _count(self, what: str) -> None:
        with self._counting:
            self.counts[what] += 1

    def _path(self, span: int) -> Path:
        return self._folder / f"{span:07d}"

    def _touch(self, span: int, descriptor: int) -> None:
        now = time.monotonic()
        if now - self._touched.get(span, -TOUCH) >= TOUCH:
            self._touched[span] = now
            os.utime(descriptor)

    def _claim(self, span: int, wait: bool) -> int | None:
        """A locked descriptor of the `.part`; -1 where its owner lives but takes too long; None: see `fill`."""
        path, patience = self._path(span), time.monotonic() + PATIENCE
        while not path.exists():
            try:
                descriptor = os.open(f"{path}.part", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise _unusable(self._root, error) from error
            # The file may have become the entry, or been removed, between its opening and its locking.
            if _locked(descriptor) and _is_same(descriptor, f"{path}.part"):
                if not path.exists():
                    return descriptor
                os.unlink(f"{path}.part")
            os.close(descriptor)
            if not wait:
                return None
            if time.monotonic() > patience:
                return -1
            time.sleep(POLL)
        return None

    def _store(self, claim: int, span: int, size: int, load: Callable[[], Iterable[Buffer]]) -> bool:
        """Pieces are written as they arrive: a span is never whole in memory."""
        try:
            self._make_room(claim, size)
            for piece in load():
                view = memoryview(piece)
                while view:
                    view = view[os.write(claim, view) :]
            assert os.fstat(claim).st_size == size == os.lseek(claim, 0, os.SEEK_CUR)
            os.rename(f"{self._path(span)}.part", self._path(span))
        except OSError as error:
            if error.errno not in _FULL:
                raise _unusable(self._root, error) from error
            if not self.is_full:
                self.is_full = True
                _log.warning("%s is on a full disk: the data set is read from its store without a cache.", self._root)
            return False
        self._count("fetched")
        return True

    def _make_room(self, claim: int, size: int) -> None:
        """Count `size` bytes more, which the `.part` shows from now on, and remove old entries if they are too many."""
        with self._accounts() as account:
            text = os.pread(account, 32, 0)
            used = int(text) if text.isdigit() else None
            if used is None or used + size > self._limit:
                used = self._evict(int(KEEP * self._limit) - size, claim)
            os.ftruncate(claim, size)
            os.pwrite(account, b"%020d" % (used + size), 0)

    @contextmanager
    def _accounts(self) -> Iterator[int]:
        """The file that says how many bytes are here (never too few), locked."""
        account = os.open(self._root / "bytes", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(account, fcntl.LOCK_EX)
            yield account
        finally:
            os.close(account)

    def _evict(self, allowed: int, claim: int) -> int:
        """Remove what was used longest ago until at most `allowed` bytes are left; returns how many these are."""
        os.ftruncate(claim, 0)
        entries = sorted(self._entries())
        used = sum(entry.size for entry in entries)
        for entry in entries:
            if used <= max(allowed, 0):
                break
            if _remove(entry.path):
                used -= entry.size
                self._count("evicted")
        return used

    def _entries(self) -> Iterator[_Entry]:
        """All files of all data sets here; what is none of ours is left alone."""
        for folder in os.scandir(self._root):
            if not folder.is_dir(follow_symlinks=False):
                continue
            for file in os.scandir(folder):
                if _ENTRY.fullmatch(file.name):
                    try:
                        about = file.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    yield _Entry(about.st_mtime, about.st_size, file.path)


def _remove(path: str) -> bool:
    """Remove an entry, or a `.part` whose writer was killed."""
    try:
        if not path.endswith(".part"):
            os.unlink(path)
            return True
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if abandoned := _locked(descriptor) and _is_same(descriptor, path):
                os.unlink(path)
            return abandoned
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return False


def _locked(descriptor: int) -> bool:
    """Whether the lock on an open file is ours now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_same(descriptor: int, path: str) -> bool:
    """Whether the open file is the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _root(options: CacheOptions) -> Path:
    """The shared folder. The one among temporary files must be this user's alone: others could plant data there."""
    own = options.folder is None
    default = Path(tempfile.gettempdir()) / f"sctrain-cache-{os.getuid()}"
    root = default if options.folder is None else Path(options.folder).expanduser()
    try:
        root.mkdir(mode=0o700, parents=not own, exist_ok=True)
        about = root.lstat()
    except OSError as error:
        raise _unusable(root, error) from error
    if own and (not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077):
        raise DataError(f"{root} is open to other users: remove it, or name another folder for the cache.")
    return root


def _unusable(root: Path, error: OSError) -> DataError:
    return DataError(
        f"the cache {root} cannot be written ({error.strerror}): name another folder for it, or give it 0 bytes."
    )
