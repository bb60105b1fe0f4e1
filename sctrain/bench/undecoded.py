"""Three ways to read what a data set stores, undecoded, through the same number of worker processes.

The clock starts when all workers are there, before they ask for anything.
"""

from __future__ import annotations

import io
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.synchronize import Barrier
from typing import Any

import numpy as np
import obstore
from torch.utils.data import DataLoader, Dataset

from data_pipeline import storage
from data_pipeline.allocator import keep_freed_memory
from data_pipeline.dataset import ShardedDataset
from data_pipeline.loader import look_ahead
from data_pipeline.reader import Reader, ReadOptions
from data_pipeline.storage import StorageSettings
from data_pipeline.storage.clients import client_of
from data_pipeline.storage.urls import object_name

RAW_BYTES = 4 * 2**20  # of one raw request
RAW_PARALLEL = 8  # such requests at once in each worker
PREFETCH = 4  # batches
WINDOW = 65_536  # samples, as runs have it
BEGIN, BEGUN = [None], []  # what a worker is told first, and what it answers
BARRIER_S = 120.0


@dataclass(frozen=True)
class DataSettings:
    """How it is read."""

    batch: int = 256  # samples
    workers: int = 2  # processes
    window: int | None = None  # samples; None: an eighth of the set, for a real set is many windows long
    rounds: int = 5
    rate: float = 500.0  # images per second that the paced consumer takes
    seconds: float = 20.0  # how long it does

    def window_of(self, dataset: ShardedDataset) -> int:
        """In samples."""
        return self.window or min(max(len(dataset) // 8, 1), WINDOW)


def rate(batches: Iterable[list[Any]]) -> float:
    """Payload bytes per second from the first sign of the workers to the last batch."""
    arriving = iter(batches)
    assert next(arriving) == BEGUN
    begin, total = time.perf_counter(), 0
    for batch in arriving:
        total += sum(len(part) for part in batch)
    return total / (time.perf_counter() - begin)


class _Undecoded(Dataset):
    """Positions -> the bytes of the samples there, as the loader's reader fetches them."""

    def __init__(self, reader: Reader):
        self._reader = reader

    def __getitem__(self, positions: np.ndarray | None) -> list[bytes]:
        if positions is None:
            return BEGUN
        return [part for part in self._reader.fetch(positions)[1] if isinstance(part, bytes)]


def _ours(dataset: ShardedDataset, settings: DataSettings) -> Iterator[list[Any]]:
    window = settings.window_of(dataset)
    ahead = look_ahead(dataset, settings.batch, world=1, workers=settings.workers, prefetch=PREFETCH)
    spans = dataset.reads_spans(window, nodes=1)
    reader = Reader(dataset, 0, window, ReadOptions(), ahead, spans=spans)
    whole = np.arange(len(dataset) // settings.batch * settings.batch).reshape(-1, settings.batch)
    return iter(_loaded(_Undecoded(reader), settings, sampler=[*BEGIN * settings.workers, *whole]))


def _webdataset(dataset: ShardedDataset, settings: DataSettings) -> Iterator[list[Any]]:
    import webdataset as wds

    plain = wds.DataPipeline(
        wds.SimpleShardList(dataset.shard_urls),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.to_tuple("npy;jpg;png;webp"),
        wds.map(_first),
        wds.batched(settings.batch, collation_fn=list),
        _begun,
    )
    return iter(_loaded(plain, settings))


def _begun(batches: Iterator[list[bytes]]) -> Iterator[list[bytes]]:
    yield BEGUN
    yield from batches


def _first(sample: tuple[bytes, ...]) -> bytes:
    return sample[0]


def _raw(dataset: ShardedDataset, settings: DataSettings) -> Iterator[list[Any]]:
    ranges = _RawRanges(dataset)
    return iter(_loaded(ranges, settings, sampler=[*BEGIN * settings.workers, *range(len(ranges))]))


class _RawRanges(Dataset):
    """The objects from end to end in large ranges, in the order in which they lie, by the transport alone."""

    def __init__(self, dataset: ShardedDataset):
        self._groups = [
            (url, start, min(start + RAW_PARALLEL * RAW_BYTES, size))
            for url, size in zip(dataset.shard_urls, dataset.index.shard_bytes.tolist(), strict=True)
            for start in range(0, size, RAW_PARALLEL * RAW_BYTES)
        ]

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, number: int | None) -> list[bytes]:
        if number is None:
            return BEGUN
        url, first, end = self._groups[number]
        starts = range(first, end, RAW_BYTES)
        sizes = [min(RAW_BYTES, end - start) for start in starts]
        if not storage.is_remote(url):
            return storage.read_ranges(url, list(zip(starts, sizes, strict=True)))
        client, name = client_of(url, StorageSettings()), object_name(url)
        return [bytes(part) for part in obstore.get_ranges(client, name, starts=list(starts), lengths=sizes)]


def _loaded(source: Any, settings: DataSettings, sampler: Any = None) -> DataLoader:
    context = multiprocessing.get_context("spawn")
    return DataLoader(
        source,
        batch_size=None,
        sampler=sampler,
        num_workers=settings.workers,
        worker_init_fn=partial(_begin_worker, context.Barrier(settings.workers)),
        multiprocessing_context=context,
    )


def _begin_worker(all_are_there: Barrier, _: int) -> None:
    """Webdataset knows no buckets; what its users register is a function that opens a stream."""
    from webdataset.gopen import gopen_schemes

    keep_freed_memory()  # as our own workers do
    all_are_there.wait(BARRIER_S)
    for scheme in ("s3", "gs", "az"):
        gopen_schemes[scheme] = _opened


def _opened(url: str, mode: str = "rb", bufsize: int = 8192, **_: object) -> io.BufferedReader:
    """One request for the whole object, as `pipe:aws s3 cp` makes it."""
    return io.BufferedReader(_Body(obstore.get(client_of(url, StorageSettings()), object_name(url))), RAW_BYTES)


class _Body(io.RawIOBase):
    """The body of an answer as a file."""

    def __init__(self, answer: obstore.GetResult):
        self._chunks = iter(answer.stream(min_chunk_size=RAW_BYTES))
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not self._rest:
            self._rest = memoryview(bytes(next(self._chunks, b"")))
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


WAYS = {"ours": _ours, "webdataset": _webdataset, "raw": _raw}
