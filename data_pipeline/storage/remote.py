"""Objects in stores: ranged reads in parallel that survive failures, and what an object is remembered by."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import obstore

from data_pipeline.errors import PREPARE_AGAIN, DataError, MissingError
from data_pipeline.storage.clients import Client, client_of
from data_pipeline.storage.failures import OVERLONG, REPLACED, TRANSPORT_ERRORS, TRUNCATED, Failure, failure_of
from data_pipeline.storage.patience import Patience
from data_pipeline.storage.ranges import Range, assemble, pieces
from data_pipeline.storage.settings import Statistics, StorageSettings
from data_pipeline.storage.urls import object_name, shown
from data_pipeline.threads import DaemonThreads

CHUNK_BYTES = 2**18  # what has arrived is kept in such pieces when a connection drops
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
        if end > self.size_of(url) and not self._remembered(url).is_proven:
            self.forget(url)
        if end > self.size_of(url):
            raise MissingError(f"{shown(url)} ends before byte {end}, so it was cut short: {PREPARE_AGAIN}.")
        patience = Patience(url, self._settings, self._statistics)
        while True:
            known = self._remembered(url)
            try:
                return self._read(url, known, ranges)
            except _MistakenError:
                if self._known.get(url) is known:
                    self.forget(url)
            patience.failed(REPLACED)

    def _read(self, url: str, known: _Known, ranges: Sequence[Range]) -> list[bytes]:
        """The ranges of this very version."""
        wanted = pieces(ranges)
        parts = [part for piece in wanted for part in piece.parts]
        stop = threading.Event()
        self._stops.add(stop)
        try:
            fetch = lambda part: self._fetch(url, known, part, stop)  # noqa: E731
            fetched = [fetch(parts[0])] if len(parts) == 1 else self._threads.map(fetch, parts)
        finally:
            stop.set()  # after an error the other parts need not go on
        return assemble(ranges, wanted, fetched)

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

    def _fetch(self, url: str, known: _Known, part: Range, stop: threading.Event) -> bytes:
        """One range; what arrived before a failure is kept and the rest asked for."""
        offset, size = part
        patience = Patience(url, self._settings, self._statistics, stop)
        arrived: list[bytes] = []
        got = 0
        while got < size:
            chunks, failure = self._attempt(url, known, offset + got, size - got)
            if chunks:
                patience.progress()
                arrived += chunks
                got += sum(map(len, chunks))
            if failure is REPLACED and not known.is_proven:
                raise _MistakenError
            if failure is not None:
                patience.failed(failure)
        return b"".join(arrived)

    def _attempt(self, url: str, known: _Known, offset: int, size: int) -> tuple[list[bytes], Failure | None]:
        """What one request brought, and why it did not bring all."""
        chunks: list[bytes] = []
        client, name = client_of(url, self._settings), object_name(url)
        try:
            with self._slots, self._statistics.request():
                result = obstore.get(client, name, options={"range": (offset, offset + size)})
                if _identity_of(result.meta) != known.identity:
                    return [], REPLACED
                known.is_proven = True
                if result.range[0] != offset:
                    return [], TRUNCATED
                for chunk in result.stream(min_chunk_size=CHUNK_BYTES):
                    chunks.append(bytes(chunk))
        except TRANSPORT_ERRORS as error:
            failure = failure_of(error)
        else:
            failure = None
        got = sum(map(len, chunks))
        if got > size:
            return [], OVERLONG
        self._statistics.add("bytes", got)
        return chunks, failure or (TRUNCATED if got < size else None)


def _identity_of(meta: obstore.ObjectMeta) -> Identity:
    return Identity(meta["e_tag"] or str(meta["last_modified"]), meta["size"])
