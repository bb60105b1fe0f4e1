"""Sample ids -> the bytes of the samples: straight from their shards, or span by span through the cache.

A store answers some hundred requests a second to one client, so samples of 16 KiB asked for one by one never reach its
throughput. Spans do; each is fetched once per machine, ahead of its first use, by a few threads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Protocol

import numpy as np

from data_pipeline.cache import SpanCache
from data_pipeline.errors import MissingError
from data_pipeline.index import SPAN_BYTES, ShardIndex
from data_pipeline.storage import forget, is_remote, read_pieces, read_range, read_ranges
from data_pipeline.threads import DaemonThreads

MOST_BEGUN = 64  # batches
REMEMBERED = 4096  # spans that were asked for ahead and need not be again

Fetched = bytes | MissingError  # what became of one sample
_Task = tuple[np.ndarray, Callable[[], list[Fetched]]]  # rows of a batch, and what waits for them


class Fetcher(Protocol):
    """One process's access to the samples of one split. Close it to end its threads."""

    @property
    def counts(self) -> dict[str, int]:
        """What happened so far, by name."""
        ...

    def read(self, sample_ids: np.ndarray) -> list[Fetched]:
        """The bytes of every sample, or why it is lost; DataError where the store cannot be reached."""
        ...

    def ahead(self, sample_ids: np.ndarray) -> None:
        """These will be read soon."""
        ...

    def again(self, sample_id: int) -> bytes:
        """One sample from its source, whatever was kept of it; errors as of `read_range`."""
        ...

    def spoiled(self, sample_id: int) -> None:
        """What was kept of this sample is not what its source has."""
        ...

    def close(self) -> None: ...


class DirectFetcher:
    """Byte ranges of shards as they are asked for; in parallel where shards are far away."""

    def __init__(self, index: ShardIndex, shard_urls: Sequence[str]):
        self._index = index
        self._urls = shard_urls
        self._threads = DaemonThreads() if is_remote(shard_urls[0]) else None
        self._begun: dict[bytes, list[_Task]] = {}  # by batch

    @property
    def counts(self) -> dict[str, int]:
        """Nothing beyond what the storage counts."""
        return {}

    def read(self, sample_ids: np.ndarray) -> list[Fetched]:
        """See Fetcher. Samples that follow each other in a shard are fetched at once."""
        fetched: list[Fetched] = [b""] * len(sample_ids)
        tasks = self._begun.pop(sample_ids.tobytes(), None)
        for run, result in tasks if tasks is not None else self._begin(sample_ids):
            _put(fetched, run.tolist(), result())
        return fetched

    def ahead(self, sample_ids: np.ndarray) -> None:
        """Begin with a batch that will be read as it is."""
        if self._threads is not None:
            self._begun[sample_ids.tobytes()] = self._begin(sample_ids)
            while len(self._begun) > MOST_BEGUN:
                del self._begun[next(iter(self._begun))]

    def again(self, sample_id: int) -> bytes:
        """See Fetcher."""
        index = self._index
        forget(self._url(sample_id))  # what it is remembered by may be wrong too
        return read_range(self._url(sample_id), int(index.offset[sample_id]), int(index.size[sample_id]))

    def spoiled(self, sample_id: int) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        if self._threads is not None:
            self._threads.close()

    def _url(self, sample_id: int) -> str:
        return self._urls[int(self._index.shard[sample_id])]

    def _runs(self, sample_ids: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
        """`rows`, ascending by sample, cut between shards."""
        shards = self._index.shard[sample_ids[rows]]
        return np.split(rows, np.flatnonzero(shards[1:] != shards[:-1]) + 1) if len(rows) else []

    def _begin(self, sample_ids: np.ndarray) -> list[_Task]:
        runs = self._runs(sample_ids, np.argsort(sample_ids, kind="stable"))
        return [(run, self._start(self._run, sample_ids[run])) for run in runs]

    def _start(self, function: Callable, *arguments: object) -> Callable:
        """The result of a call, when asked for."""
        if self._threads is None:
            return lambda: function(*arguments)
        future: Future = Future()
        self._threads.start(future, function, *arguments)
        return future.result

    def _run(self, ids: np.ndarray) -> list[Fetched]:
        """Samples of one shard, ascending."""
        index = self._index
        url, offset, size = self._url(int(ids[0])), index.offset[ids], index.size[ids].astype(np.int64)
        # A range goes on where a sample begins right behind the one before (or is the same), up to about a span.
        joined = (offset[1:] == offset[:-1] + size[:-1]) & (offset[1:] // SPAN_BYTES == offset[:-1] // SPAN_BYTES)
        first = np.concatenate([[0], np.flatnonzero(~joined & (ids[1:] != ids[:-1])) + 1])
        last = np.concatenate([first[1:], [len(ids)]]) - 1
        starts = offset[first]
        try:
            parts = read_ranges(
                url, list(zip(starts.tolist(), (offset[last] + size[last] - starts).tolist(), strict=True))
            )
        except MissingError as error:
            return [self._alone(sample_id, error) for sample_id in ids.tolist()]
        within = np.repeat(np.arange(len(first)), last - first + 1)
        begin = offset - starts[within]
        return [
            parts[part][start:end]
            for part, start, end in zip(within.tolist(), begin.tolist(), (begin + size).tolist(), strict=True)
        ]

    def _alone(self, sample_id: int, error: MissingError) -> Fetched:
        """A shard that was cut short still has the samples before the cut."""
        try:
            return self.again(sample_id)
        except MissingError:
            return error


class SpanFetcher:
    """Samples out of spans that are kept in a folder of this machine."""

    def __init__(self, index: ShardIndex, shard_urls: Sequence[str], cache: SpanCache):
        self._index = index
        self._urls = shard_urls
        self._cache = cache
        self._direct = DirectFetcher(index, shard_urls)
        self._threads = DaemonThreads()
        self._loading: dict[int, Future[bool]] = {}  # whether the cache could take it
        self._asked: dict[int, None] = {}  # in the order of asking
        self._counts = {"hits": 0, "misses": 0}

    @property
    def counts(self) -> dict[str, int]:
        """Samples found (`cache_hits`) or not (`cache_misses`), spans fetched, evicted and found spoiled."""
        return {f"cache_{name}": count for name, count in (*self._counts.items(), *self._cache.counts.items())}

    def read(self, sample_ids: np.ndarray) -> list[Fetched]:
        """See Fetcher."""
        if self._cache.is_full:
            return self._direct.read(sample_ids)
        fetched: list[Fetched] = [b""] * len(sample_ids)
        missing: list[tuple[int, list[int], Future[bool]]] = []
        for span, rows in self._by_span(sample_ids).items():
            parts = self._cache.read(span, self._ranges(span, sample_ids[rows]))
            self._counts["misses" if parts is None else "hits"] += len(rows)
            if parts is None:
                missing.append((span, rows, self._load(span, wait=True)))
            else:
                _put(fetched, rows, parts)
        for span, rows, loading in missing:
            _put(fetched, rows, self._awaited(span, sample_ids[rows], loading))
        return fetched

    def ahead(self, sample_ids: np.ndarray) -> None:
        """Start loading the spans of these samples, without a word if that fails: reading them will tell."""
        for span in np.unique(self._spans(sample_ids)).tolist():
            if span not in self._asked and not self._cache.is_full:
                self._asked[span] = None
                self._load(span, wait=False)
        while len(self._asked) > REMEMBERED:
            del self._asked[next(iter(self._asked))]

    def again(self, sample_id: int) -> bytes:
        """See Fetcher."""
        return self._direct.again(sample_id)

    def spoiled(self, sample_id: int) -> None:
        """Drop the span, to be fetched anew at its next use."""
        self._cache.drop(int(self._spans(np.array([sample_id]))[0]))

    def close(self) -> None:
        self._threads.close()
        self._direct.close()

    def _spans(self, sample_ids: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._index.span_starts, sample_ids, side="right") - 1

    def _by_span(self, sample_ids: np.ndarray) -> dict[int, list[int]]:
        rows: defaultdict[int, list[int]] = defaultdict(list)
        for row, span in enumerate(self._spans(sample_ids).tolist()):
            rows[span].append(row)
        return rows

    def _ranges(self, span: int, sample_ids: np.ndarray) -> list[tuple[int, int]]:
        """Where samples lie inside their span."""
        start = self._index.offset[self._index.span_starts[span]]
        return list(
            zip((self._index.offset[sample_ids] - start).tolist(), self._index.size[sample_ids].tolist(), strict=True)
        )

    def _load(self, span: int, *, wait: bool) -> Future[bool]:
        """Fetch a span in the background unless that is under way; see `SpanCache.fill`."""
        loading = self._loading.get(span)
        if loading is None:
            loading = self._loading[span] = Future()  # before it starts, or it could end unnoticed
            self._threads.start(loading, self._fill, span, wait)
        return loading

    def _fill(self, span: int, wait: bool) -> bool:
        first, last = self._index.span_starts[span : span + 2] - [0, 1]
        start = int(self._index.offset[first])
        size = int(self._index.offset[last] + self._index.size[last]) - start
        url = self._urls[int(self._index.shard[first])]
        try:
            return self._cache.fill(span, size, lambda: read_pieces(url, start, size), wait=wait)
        finally:
            self._loading.pop(span, None)

    def _awaited(self, span: int, sample_ids: np.ndarray, loading: Future[bool]) -> Sequence[Fetched]:
        """Samples of a span that was not here a moment ago."""
        ranges = self._ranges(span, sample_ids)
        while True:
            try:
                kept = loading.result()
            except MissingError:
                kept = False  # the span is lost; some of its samples may not be
            if not kept:
                return self._direct.read(sample_ids)
            parts = self._cache.read(span, ranges)  # unless it is already gone again
            if parts is not None:
                return parts
            loading = self._load(span, wait=True)


def _put(fetched: list[Fetched], rows: Sequence[int], parts: Iterable[Fetched]) -> None:
    for row, part in zip(rows, parts, strict=True):
        fetched[row] = part
