"""`sctrain bench data`: how fast samples arrive, beside plain webdataset and beside raw reads of the same objects.

All three deliver what is stored, undecoded, through the same number of worker processes. Each round reads the whole set
once with each, ours from a cold cache.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import numpy as np

from data_pipeline import storage
from data_pipeline.cache import CacheOptions
from data_pipeline.dataset import ShardedDataset, open_dataset
from data_pipeline.description import DESCRIPTION_FILE, read_description
from data_pipeline.errors import DataError
from data_pipeline.generated import GENERATED, write_latents
from data_pipeline.index import load_index
from data_pipeline.loader import BatchStream, stream
from sctrain.bench.table import table
from sctrain.bench.undecoded import PREFETCH, WAYS, DataSettings, rate

LATENT_BYTES = 34_304  # of a generated sample in its shard, headers included
LEAST_SHARDS, SHARD_BYTES = 8, 2**28
WARM_UP = 5  # batches before the paced consumer is timed


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
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(settings.rounds):
        for name in list(WAYS)[turn % len(WAYS) :] + list(WAYS)[: turn % len(WAYS)]:
            with _cold(dataset) as cold:
                rates[name].append(rate(WAYS[name](cold, settings)))
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
        window=settings.window_of(dataset),
        rates=rates,
        images_per_second=images,
        decode_ceiling=_decode_ceiling(dataset, settings),
    )


@contextmanager
def _cold(dataset: ShardedDataset) -> Iterator[ShardedDataset]:
    """The data set with an empty cache, which is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="sctrain-bench-") as folder:
        yield replace(dataset, cache=CacheOptions(folder))


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
        window=settings.window_of(dataset),
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
