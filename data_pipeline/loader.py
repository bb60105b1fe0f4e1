"""The endless stream of batches of one rank, in exactly the order of `order.py` whatever the number of workers.

Positions are handed out in order and batches come back in order; threads and processes only fetch ahead. The whole
state of a stream is the position it starts from, which the trainer keeps.
"""

import atexit
import logging
import os
import signal
import time
from collections import defaultdict, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Self

import numpy as np
import torch
from torch.utils.data import DataLoader

from data_pipeline import storage
from data_pipeline.allocator import keep_freed_memory
from data_pipeline.dataset import ShardedDataset, open_dataset
from data_pipeline.errors import DataError
from data_pipeline.order import micro_batch_positions
from data_pipeline.reader import Batch, LookAhead, Reader, ReadOptions
from data_pipeline.storage import StorageSettings, is_remote

__all__ = ["Batch", "BatchStream", "ReadOptions", "ShardedDataset", "open_dataset", "stream"]

SAMPLES_TO_JUDGE = 10_000  # the share of damaged ones is taken of at least so many
MOST_TOLD = 50  # problems that are logged
AHEAD_BYTES = 64 * 2**20  # of samples whose fetching has begun: a tenth of a second of a fast network
MOST_AHEAD = 64  # batches
DEFAULT = ReadOptions()
_log = logging.getLogger(__name__)


class BatchStream(Iterator[Batch]):
    """An endless iterator of batches. Close it, or leave its `with` block, to end its threads and processes."""

    def __init__(self, batches: Generator[Batch], max_corrupt_share: float):
        self._batches = batches
        self._share = max_corrupt_share
        self._told = 0
        self.wait_seconds = 0.0  # how long the consumer has waited for data so far
        self.statistics: defaultdict[str, float] = defaultdict(float)  # of all batches so far, see Batch

    def __next__(self) -> Batch:
        """The next batch; a DataError of the thread or process that read it is raised here unchanged."""
        start = time.perf_counter()
        try:
            batch = next(self._batches)
        finally:
            self.wait_seconds += time.perf_counter() - start
        for name, value in batch.statistics.items():
            self.statistics[name] += value
        if batch.damaged:
            self._tell(batch.damaged)
            self._check_share(batch.damaged[-1])
        return batch

    def _tell(self, problems: Sequence[str]) -> None:
        for problem in problems[: max(MOST_TOLD - self._told, 0)]:
            _log.warning("%s Another sample takes its place.", problem)
        self._told += len(problems)
        if self._told - len(problems) < MOST_TOLD <= self._told:
            _log.warning("Further samples that have to be replaced are counted only.")

    def _check_share(self, problem: str) -> None:
        """DataError once too many samples were replaced; the first few may be an accident."""
        read, replaced = self.statistics["samples"], self.statistics["replaced"]
        if replaced > self._share * max(read, SAMPLES_TO_JUDGE):
            raise DataError(
                f"{replaced:,.0f} of {read:,.0f} samples were damaged or lost, and max_corrupt_share is {self._share}; "
                f"the last: {problem}"
            )

    def close(self) -> None:
        self._batches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def stream(
    dataset: ShardedDataset,
    *,
    seed: int,
    start: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world: int,
    workers: int,
    prefetch: int,
    window: int,
    nodes: int = 1,
    options: ReadOptions = DEFAULT,
) -> BatchStream:
    """The batches of `rank` from position `start` on (see `micro_batch_positions`), `prefetch` of them read ahead.

    `workers` 0 reads in one background thread, more in that many processes; `window` is the shuffle window in samples;
    `nodes` says on how many machines the ranks are, which decides how they fetch, never what.
    """
    if options.flip and dataset.description.latents is not None:
        raise DataError(f"{dataset.url} holds latents, which have no mirror images: switch the flip off.")
    spans = dataset.reads_spans(window, nodes)
    if is_remote(dataset.url) and 0 < dataset.cache.limit < dataset.window_bytes(window):
        _log.warning(
            "A shuffle window of %s samples takes %.1f GiB, the cache may hold %.1f: samples are fetched one by one.",
            *(f"{window:,}", dataset.window_bytes(window) / 2**30, dataset.cache.limit / 2**30),
        )
    ahead = look_ahead(dataset, micro_batch, world, workers, prefetch)
    reader = Reader(dataset, seed, window, options, ahead, spans=spans)
    positions = micro_batch_positions(start, global_batch, micro_batch, rank, world)
    if workers:
        return BatchStream(_from_workers(reader, positions, workers, prefetch), options.max_corrupt_share)
    return BatchStream(_from_thread(reader, positions, prefetch), options.max_corrupt_share)


def look_ahead(dataset: ShardedDataset, micro_batch: int, world: int, workers: int, prefetch: int) -> LookAhead:
    """What each process of a rank begins to fetch early: its own batches, all together AHEAD_BYTES or `prefetch`."""
    if not is_remote(dataset.url):
        return LookAhead(0, 0)
    processes, stride = max(workers, 1), micro_batch * world
    batches = min(max(round(AHEAD_BYTES / (stride * dataset.index.mean_bytes)), prefetch), MOST_AHEAD)
    return LookAhead(processes * stride, -(-batches // processes))


def _from_thread(reader: Reader, positions: Iterator[np.ndarray], prefetch: int) -> Generator[Batch]:
    pin = torch.cuda.is_available()
    pool = ThreadPoolExecutor(1, thread_name_prefix="data")
    ahead: deque[Future[Batch | DataError]] = deque()
    try:
        while True:
            while len(ahead) < prefetch:
                ahead.append(pool.submit(reader.__getitem__, next(positions)))
            batch = _raised(ahead.popleft().result())
            yield batch.pin_memory() if pin else batch
    finally:
        pool.shutdown(cancel_futures=True)
        reader.close()


def _from_workers(reader: Reader, positions: Iterator[np.ndarray], workers: int, prefetch: int) -> Generator[Batch]:
    loader = DataLoader(
        reader,
        batch_size=None,
        sampler=positions,
        num_workers=workers,
        prefetch_factor=-(-prefetch // workers),
        worker_init_fn=partial(_begin_worker, storage.settings()),
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="spawn",  # a forked child would inherit CUDA, threads and clients of the trainer
        generator=torch.Generator(),  # keeps the loader's own seeding away from the global generator
    )
    batches = iter(loader)
    end_workers = batches._shutdown_workers
    atexit.register(end_workers)  # or an unclosed stream would hang at exit: multiprocessing sends only SIGTERM
    try:
        for batch in batches:
            yield _raised(batch)
    finally:
        atexit.unregister(end_workers)
        end_workers()


def _raised(batch: Batch | DataError) -> Batch:
    if isinstance(batch, DataError):
        raise batch
    return batch


def _begin_worker(settings: StorageSettings, _: int) -> None:
    """Stores are read as in the trainer's process.

    Signals are left to the trainer: they often reach the whole group, and it needs its data to finish the step. And a
    worker ends at once. Python would stop the thread that hands batches over in the middle of torch's code, which
    aborts the process, and then the trainer's.
    """
    keep_freed_memory()
    atexit.register(os._exit, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    storage.configure(settings)
