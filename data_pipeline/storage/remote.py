"""Objects in stores: ranged reads in parallel that survive failures, and what an object is remembered by."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import obstore

from data_pipeline.errors import PREPARE_AGAIN, DataError, MissingError
from data_pipeline.storage.clients import Client, client_of
from data_pipeline.storage.failures import OVERLONG, REPLACED, TRANSPORT_ERRORS, TRUNCATED, Failure, failure_of
from data_pipeline.storage.patience import Patience
from data_pipeline.storage.ranges import Range, assemble, pieces
from data_pipeline.storage.settings import Statistics, StorageSettings
from data_pipeline.storage.urls import object_name, shown
from data_pipeline.threads import DaemonThreads

if TYPE_CHECKING:
    from typing_extensions import Buffer

PIECE_BYTES = 2**19  # what has arrived is handed on in pieces of about so much, whatever comes after
Result = TypeVar("Result")


class Identity(NamedTuple):
    """What tells one version of an object from another."""

    tag: str
    size: int  # bytes


class _Known:
    """An object's identity, and whether a body ever came with it: before, the looks themselves may have been wrong."""

    def __init__(self, identity: Identity):
        self.identity, self.is_proven = identity, False


class _MistakenError(Exception):
    """A body came with another identity than the one that was not proven yet."""


class _FailedError(Exception):
    """One request did not bring all."""

    def __init__(self, failure: Failure):
        super().__init__(failure.reason)
        self.failure = failure


class RemoteReader:
    """One process's reading from stores. Close it to end its threads and what they are waiting for."""

    def __init__(self, settings: StorageSettings, statistics: Statistics):
        self._settings = settings
        self._statistics = statistics
        self._threads = DaemonThreads(settings.parallel)
        self._slots = threading.Semaphore(settings.parallel)  # for callers have threads of their own too
        self._known: dict[str, _Known] = {}
        self._stops: weakref.WeakSet[threading.Event] = weakref.WeakSet()

    def close(self) -> None:
        """Give up what is under way."""
        for stop in list(self._stops):
            stop.set()
        self._threads.close(finish=True)  # what has not begun fails at once, and whoever waits for it is told

    def forget(self, url: str) -> None:
        """The object may be another from now on."""
        self._known.pop(url, None)

    def size_of(self, url: str) -> int:
        """Size in bytes, as of the first look at the object."""
        return self._remembered(url).identity.size

    def exists(self, url: str) -> bool:
        """Whether there is such an object now."""
        try:
            self._look(url)
        except MissingError:
            return False
        return True

    def read_ranges(self, url: str, ranges: Sequence[Range]) -> list[bytes]:
        """The ranges (offset, size), fetched in parallel, near ones together and large ones in parts."""
        end = max((offset + size for offset, size in ranges), default=0)
        [read] = self._of_one_version(url, end, lambda known: [self._read(url, known, ranges)])
        return read

    def read_pieces(self, url: str, wanted: Range) -> Iterator[Buffer]:
        """One range (offset, size) as it arrives, by one request after the other."""
        return self._of_one_version(url, sum(wanted), lambda known: self._fetch_alone(url, known, wanted))

    def _of_one_version(
        self, url: str, end: int, read: Callable[[_Known], Iterable[Result]]
    ) -> Generator[Result, None, None]:
        """What `read` brings of an object that must have `end` bytes, begun anew if it was mistaken for another."""
        if end > self.size_of(url) and not self._remembered(url).is_proven:
            self.forget(url)
        if end > self.size_of(url):
            raise MissingError(f"{shown(url)} ends before byte {end}, so it was cut short: {PREPARE_AGAIN}.")
        patience = Patience(url, self._settings, self._statistics)
        while True:
            known = self._remembered(url)
            try:
                yield from read(known)
                return
            except _MistakenError:  # by the first body, so nothing was handed on
                if self._known.get(url) is known:
                    self.forget(url)
            patience.failed(REPLACED)

    def _read(self, url: str, known: _Known, ranges: Sequence[Range]) -> list[bytes]:
        wanted = pieces(ranges)
        parts = [part for piece in wanted for part in piece.parts]
        with self._stopping() as stop:  # after an error the other parts need not go on
            fetch = lambda part: b"".join(self._fetch(url, known, part, stop))  # noqa: E731
            fetched = [fetch(parts[0])] if len(parts) == 1 else self._threads.map(fetch, parts)
        return assemble(ranges, wanted, fetched)

    def _fetch_alone(self, url: str, known: _Known, wanted: Range) -> Iterator[Buffer]:
        with self._stopping() as stop:
            yield from self._fetch(url, known, wanted, stop)

    @contextmanager
    def _stopping(self) -> Iterator[threading.Event]:
        """What ends the waiting of one read: its own end, or the reader's."""
        stop = threading.Event()
        self._stops.add(stop)
        try:
            yield stop
        finally:
            stop.set()

    def ask(self, url: str, request: Callable[[Client], Result], *, done: str = "read") -> Result:
        """A request that answers at once or fails, repeated until the budget is spent."""
        patience = Patience(url, self._settings, self._statistics, done=done)
        while True:
            client = client_of(url, self._settings)
            try:
                with self._slots, self._statistics.request():
                    return request(client)
            except TRANSPORT_ERRORS as error:
                failure = failure_of(error)
            patience.failed(failure)  # outside of `except`: the transport's error quotes signatures

    def _look(self, url: str) -> Identity:
        name = object_name(url)
        try:
            return self.ask(url, lambda client: _identity_of(obstore.head(client, name)))
        except DataError as error:
            if not url.startswith("http") or isinstance(error, MissingError):
                raise
        # A signature for reading does not cover HEAD, and some servers do not know it.
        return self.ask(url, lambda client: _identity_of(obstore.get(client, name, options={"range": (0, 1)}).meta))

    def _remembered(self, url: str) -> _Known:
        """What the object is remembered by: the first that two looks agree on."""
        known, patience = self._known.get(url), Patience(url, self._settings, self._statistics)
        while known is None:
            first = self._look(url)
            if first == self._look(url):
                known = self._known.setdefault(url, _Known(first))
            else:
                patience.failed(REPLACED)
        return known

    def _fetch(self, url: str, known: _Known, part: Range, stop: threading.Event) -> Iterator[Buffer]:
        """One range; what arrived before a failure is kept and the rest asked for."""
        offset, end = part[0], sum(part)
        patience = Patience(url, self._settings, self._statistics, stop)
        while offset < end:
            failure = None
            try:
                for piece in self._attempt(url, known, offset, end - offset):
                    offset += len(piece)
                    patience.progress()
                    yield piece
            except _FailedError as failed:
                failure = failed.failure
            if failure is REPLACED and not known.is_proven:
                raise _MistakenError
            if failure is not None:
                patience.failed(failure)  # outside of `except`: what is raised here has no history

    def _attempt(self, url: str, known: _Known, offset: int, size: int) -> Iterator[Any]:
        """What one request brings; _FailedError if that is not all."""
        client, name = client_of(url, self._settings), object_name(url)
        try:
            with self._slots, self._statistics.request():
                result = obstore.get(client, name, options={"range": (offset, offset + size)})
                if _identity_of(result.meta) != known.identity:
                    raise _FailedError(REPLACED)
                known.is_proven = True
                if result.range[0] != offset:
                    raise _FailedError(TRUNCATED)
                for piece in result.stream(min_chunk_size=PIECE_BYTES):
                    if len(piece) > size:
                        raise _FailedError(OVERLONG)
                    size -= len(piece)
                    self._statistics.add("bytes", len(piece))
                    yield piece
        except TRANSPORT_ERRORS as error:
            raise _FailedError(failure_of(error)) from None
        if size:
            raise _FailedError(TRUNCATED)


def _identity_of(meta: obstore.ObjectMeta) -> Identity:
    return Identity(meta["e_tag"] or str(meta["last_modified"]), meta["size"])
