"""`sctrain bench data`: how fast samples arrive, beside plain webdataset and beside raw reads of the same objects.

All three deliver what is stored, undecoded, through the same number of worker processes. Each round reads the whole set
once with each, ours from a cold cache; the clock starts when all workers are there, before they ask for anything.
"""

from __future__ import annotations

import io
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from multiprocessing.synchronize import Barrier
from typing import Any

import numpy as np
import obstore
from torch.utils.data import DataLoader, Dataset

from data_pipeline import storage
from data_pipeline.allocator import keep_freed_memory
from data_pipeline.cache import CacheOptions
from data_pipeline.dataset import ShardedDataset, open_dataset
from data_pipeline.description import DESCRIPTION_FILE, read_description
from data_pipeline.errors import DataError
from data_pipeline.generated import GENERATED, write_latents
from data_pipeline.index import load_index
from data_pipeline.loader import BatchStream, look_ahead, stream
from data_pipeline.reader import Reader, ReadOptions
from data_pipeline.storage import StorageSettings
from data_pipeline.storage.clients import client_of
from data_pipeline.storage.urls import object_name
from sctrain.bench.table import table

RAW_BYTES = 4 * 2**20  # of one raw request
RAW_PARALLEL = 8  # such requests at once in each worker
LATENT_BYTES = 34_304  # of a generated sample in its shard, headers included
LEAST_SHARDS, SHARD_BYTES = 8, 2**28
PREFETCH = 4  # batches
WINDOW = 65_536  # samples, as runs have it
BEGIN, BEGUN = [None], []  # what a worker is told first, and what it answers
BARRIER_S = 120.0
WARM_UP = 5  # batches before the paced consumer is timed


@dataclass(frozen=True)
class DataSettings:
    """How it is read."""

    batch: int = 256  # samples
    workers: int = 2  # processes
    window: int | None = None  # samples; None: an eighth of the set, for a real set is many windows long
    rounds: int = 5
    rate: float = 500.0  # images per second that the paced consumer takes
    seconds: float = 20.0  # how long it does


@dataclass(frozen=True)
class DataResult:
    """Ratios are of payload bytes per second, medians over rounds; rates in bytes per second."""

    ratio_webdataset: float  # ours to a plain webdataset DataLoader
    ratio_raw: float  # ours to raw reads in parallel
    wait_share: float  # of the paced consumer's time
    first_batch_s: float  # from opening the data set, cold, to the first decoded batch, in one process
    index_mb: float  # resident memory that loading the index took
    samples: int
    payload_bytes: int
    window: int  # samples
    rates: dict[str, list[float]] = field(default_factory=dict)
    images_per_second: float = 0.0  # decoded, as fast as they come
    decode_ceiling: float = 0.0  # images per second that the workers could decode if all were in memory


def generate(url: str, size: int) -> None:
    """Random latents of about `size` bytes in at least 8 shards; DataError if there is another data set."""
    samples = max(size // LATENT_BYTES, LEAST_SHARDS)
    shards = max(LEAST_SHARDS, size // SHARD_BYTES)
    if storage.exists(storage.join_url(url, DESCRIPTION_FILE)) and read_description(url).name != GENERATED:
        raise DataError(f"{url} holds a data set: name an empty folder for --generate, or leave it out.")
    write_latents(url, samples, shards)


def summary(result: DataResult) -> str:
    """In words, for people."""
    lines = [(name, *(f"{rate / 2**20:.0f}" for rate in rates)) for name, rates in result.rates.items()]
    head = ("MiB/s", *(f"round {number}" for number in range(1, len(lines[0]))))
    return "\n".join(
        [
            f"{result.samples:,} samples, {result.payload_bytes / 2**20:,.0f} MiB, read undecoded, shuffled over "
            f"{result.window:,}:",
            table(head, lines),
            f"ours / webdataset    {result.ratio_webdataset:.2f}",
            f"ours / raw ranges    {result.ratio_raw:.2f}",
            f"wait of the paced    {result.wait_share:.2%}",
            f"first batch          {result.first_batch_s:.2f} s, cold",
            f"index                {result.index_mb:.0f} MB",
            f"decoded              {result.images_per_second:,.0f} images/s; workers alone, from memory: "
            f"{result.decode_ceiling:,.0f}",
        ]
    )


def measure(url: str, settings: DataSettings) -> DataResult:
    """Read the training split of `url` in every way; DataError if there is none."""
    dataset = open_dataset(url, "train")
    settings = replace(settings, window=settings.window or min(max(len(dataset) // 8, 1), WINDOW))
    ways = {"ours": _ours, "webdataset": _webdataset, "raw": _raw}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(settings.rounds):
        for name in list(ways)[turn % len(ways) :] + list(ways)[: turn % len(ways)]:
            with _cold(dataset) as cold:
                rates[name].append(_rate(ways[name](cold, settings)))
    ratios = {
        name: statistics.median(ours / other for ours, other in zip(rates["ours"], rates[name], strict=True))
        for name in ("webdataset", "raw")
    }
    with _cold(dataset) as cold:
        first = _first_batch_seconds(url, cold, settings)
        wait, images = _paced_wait(cold, settings), _images_per_second(cold, settings)
    return DataResult(
        ratio_webdataset=ratios["webdataset"],
        ratio_raw=ratios["raw"],
        wait_share=wait,
        first_batch_s=first,
        index_mb=_index_megabytes(storage.join_url(url, dataset.description.splits["train"].index)),
        samples=len(dataset),
        payload_bytes=int(dataset.index.size.sum()),
        window=settings.window or 0,
        rates=rates,
        images_per_second=images,
        decode_ceiling=_decode_ceiling(dataset, settings),
    )


@contextmanager
def _cold(dataset: ShardedDataset) -> Iterator[ShardedDataset]:
    """The data set with an empty cache, which is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="sctrain-bench-") as folder:
        yield replace(dataset, cache=CacheOptions(folder))


def _rate(batches: Iterable[list[Any]]) -> float:
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
    assert settings.window is not None
    ahead = look_ahead(dataset, settings.batch, world=1, workers=settings.workers, prefetch=PREFETCH)
    spans = dataset.reads_spans(settings.window, nodes=1)
    reader = Reader(dataset, 0, settings.window, ReadOptions(), ahead, spans=spans)
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


def _first_batch_seconds(url: str, cold: ShardedDataset, settings: DataSettings) -> float:
    begin = time.perf_counter()
    dataset = open_dataset(url, "train", cache=cold.cache)
    with _stream(dataset, settings, workers=0) as batches:
        next(batches)
        return time.perf_counter() - begin


def _paced_wait(dataset: ShardedDataset, settings: DataSettings) -> float:
    """The share of time that a consumer of `rate` images per second waits for decoded batches."""
    pause = settings.batch / settings.rate
    with _stream(dataset, settings, settings.workers) as batches:
        for _ in range(WARM_UP):
            next(batches)
            time.sleep(pause)
        begin, waited = time.perf_counter(), batches.wait_seconds
        while time.perf_counter() - begin < settings.seconds:
            next(batches)
            time.sleep(pause)
        return (batches.wait_seconds - waited) / (time.perf_counter() - begin)


def _images_per_second(dataset: ShardedDataset, settings: DataSettings) -> float:
    """Decoded, over at most two epochs, from the cache that the paced consumer has filled."""
    count = max(2 * len(dataset) // settings.batch, 2)
    with _stream(dataset, settings, settings.workers) as batches:
        next(batches)
        begin = time.perf_counter()
        for _ in islice(batches, count - 1):
            if time.perf_counter() - begin > settings.seconds:
                break
        return batches.statistics["samples"] / (time.perf_counter() - begin)


def _stream(dataset: ShardedDataset, settings: DataSettings, workers: int) -> BatchStream:
    assert settings.window is not None
    return stream(
        dataset,
        seed=0,
        start=0,
        global_batch=settings.batch,
        micro_batch=settings.batch,
        rank=0,
        world=1,
        workers=workers,
        prefetch=PREFETCH,
        window=settings.window,
    )


def _decode_ceiling(dataset: ShardedDataset, settings: DataSettings) -> float:
    fetcher = dataset.fetcher()
    ids = np.arange(min(len(dataset), 4 * settings.batch))
    fetched = fetcher.read(ids)
    begin = time.perf_counter()
    dataset.decode(ids, fetched, fetcher)
    seconds = time.perf_counter() - begin
    fetcher.close()
    return settings.workers * len(ids) / seconds


def _index_megabytes(url: str) -> float:
    """In a process of its own, whose peak is the index's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(partial(_peak_growth, url))


def _peak_growth(url: str) -> float:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    index = load_index(url)
    assert index.span_starts is not None
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
