"""Objects in stores: ranged reads in parallel that survive failures, and what an object is remembered by."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
AGREED, PROVEN = 2, 3  # answers
MOST_LOOKS = 8  # at an object of which every answer tells something else
Result = TypeVar("Result")


class Identity(NamedTuple):
    """What tells one version of an object from another."""

    tag: str
    size: int  # bytes


class _Failed(Exception):
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
        self._identities: dict[str, Identity] = {}
        self._votes: dict[str, Counter[Identity]] = {}  # how many answers told it
        self._voting = threading.Lock()
        self._stops: weakref.WeakSet[threading.Event] = weakref.WeakSet()

    def close(self) -> None:
        """Give up what is under way."""
        for stop in list(self._stops):
            stop.set()
        self._threads.close(finish=True)  # what has not begun fails at once, and whoever waits for it is told

    def forget(self, url: str) -> None:
        """The object may be another from now on."""
        with self._voting:
            self._identities.pop(url, None)
            self._votes.pop(url, None)

    def size_of(self, url: str) -> int:
        """Size in bytes, as of the first looks at the object."""
        known = self._identities.get(url)
        for _ in range(MOST_LOOKS):
            known = known or self._answer(url, self._look(url))
        if known is None:
            raise REPLACED.error(url)
        return known.size

    def exists(self, url: str) -> bool:
        """Whether there is such an object now."""
        try:
            self._look(url)
        except MissingError:
            return False
        return True

    def read_ranges(self, url: str, ranges: Sequence[Range]) -> list[bytes]:
        """The ranges (offset, size), fetched in parallel, near ones together and large ones in parts."""
        self._expect(url)
        wanted = pieces(ranges)
        parts = [part for piece in wanted for part in piece.parts]
        with self._stopping() as stop:  # after an error the other parts need not go on
            fetch = lambda part: b"".join(self._fetch(url, part, stop))  # noqa: E731
            fetched = [fetch(parts[0])] if len(parts) == 1 else self._threads.map(fetch, parts)
        return assemble(ranges, wanted, fetched)

    def read_pieces(self, url: str, wanted: Range) -> Iterator[Buffer]:
        """One range as it arrives."""
        self._expect(url)
        with self._stopping() as stop:
            yield from self._fetch(url, wanted, stop)

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

    def _expect(self, url: str) -> None:
        """Look at an object before it is read, unless an answer about it is known."""
        if url not in self._votes:
            self._answer(url, self._look(url))

    def _answer(self, url: str, answer: Identity) -> Identity | None:
        """What the object is remembered by, given one more answer: the first that two answers agree on.

        These may both have been wrong, so until there is a third, another that more agree on takes its place.
        """
        with self._voting:
            votes, known = self._votes.setdefault(url, Counter()), self._identities.get(url)
            votes[answer] += 1
            is_doubtful = known is None or votes[known] < min(PROVEN, votes[answer])
            if votes[answer] >= AGREED and is_doubtful:
                known = self._identities[url] = answer
            return known

    def _fetch(self, url: str, part: Range, stop: threading.Event) -> Iterator[Buffer]:
        """One range; what arrived before a failure is kept and the rest asked for."""
        offset, end = part[0], sum(part)
        patience = Patience(url, self._settings, self._statistics, stop)
        version: list[Identity] = []  # of what has arrived, which the rest must have too
        while offset < end:
            failure = None
            try:
                for piece in self._attempt(url, offset, end - offset, version):
                    offset += len(piece)
                    patience.progress()
                    yield piece
            except _Failed as failed:
                failure = failed.failure
            if failure is not None:
                patience.failed(failure)  # outside of `except`: what is raised here has no history

    def _attempt(self, url: str, offset: int, size: int, version: list[Identity]) -> Iterator[Any]:
        """What one request brings; _Failed if that is not all."""
        client, name = client_of(url, self._settings), object_name(url)
        try:
            with self._slots, self._statistics.request():
                result = obstore.get(client, name, options={"range": (offset, offset + size)})
                found = _identity_of(result.meta)
                if self._answer(url, found) != found or version not in ([], [found]):
                    raise _Failed(REPLACED)
                if offset + size > found.size:
                    end = offset + size
                    raise MissingError(f"{shown(url)} ends before byte {end}, so it was cut short: {PREPARE_AGAIN}.")
                if result.range[0] != offset:
                    raise _Failed(TRUNCATED)
                for piece in result.stream(min_chunk_size=PIECE_BYTES):
                    if len(piece) > size:
                        raise _Failed(OVERLONG)
                    size -= len(piece)
                    version[:] = [found]
                    self._statistics.add("bytes", len(piece))
                    yield piece
        except TRANSPORT_ERRORS as error:
            raise _Failed(failure_of(error)) from None
        if size:
            raise _Failed(TRUNCATED)


def _identity_of(meta: obstore.ObjectMeta) -> Identity:
    return Identity(meta["e_tag"] or str(meta["last_modified"]), meta["size"])
