"""The endless stream of batches of one rank, in exactly the order of `order.py` whatever the number of workers.

Positions are handed out in order and batches come back in order; threads and processes only fetch ahead. The whole
state of a stream is the position it starts from, which the trainer keeps.
"""

import atexit
import signal
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data_pipeline.dataset import ShardedDataset, open_dataset
from data_pipeline.errors import DataError
from data_pipeline.order import SampleOrder, micro_batch_positions

__all__ = ["Batch", "BatchStream", "ShardedDataset", "open_dataset", "stream"]


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank."""

    images: torch.Tensor  # (B, C, H, W) uint8
    labels: torch.Tensor  # (B,) int64
    positions: torch.Tensor  # (B,) int64: places in the endless global sequence, the key of all per-sample randomness

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory (torch's DataLoader calls this by name)."""
        return type(self)(self.images.pin_memory(), self.labels.pin_memory(), self.positions.pin_memory())


class BatchStream(Iterator[Batch]):
    """An endless iterator of batches. Close it, or leave its `with` block, to end its threads and processes."""

    def __init__(self, batches: Generator[Batch]):
        self._batches = batches
        self.wait_seconds = 0.0  # how long the consumer has waited for data so far

    def __next__(self) -> Batch:
        """The next batch; a DataError of the thread or process that read it is raised here unchanged."""
        start = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.wait_seconds += time.perf_counter() - start

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
) -> BatchStream:
    """The batches of `rank` from position `start` on (see `micro_batch_positions`), `prefetch` of them read ahead.

    `workers` 0 reads in one background thread, more in that many processes; `window` is the shuffle window in samples.
    """
    reader = _Reader(dataset, SampleOrder(dataset.index, seed, window))
    positions = micro_batch_positions(start, global_batch, micro_batch, rank, world)
    if workers:
        return BatchStream(_from_workers(reader, positions, workers, prefetch))
    return BatchStream(_from_thread(reader, positions, prefetch))


class _Reader(Dataset):
    """Positions -> a batch, or the error that reading them gave (torch would otherwise rewrite it across processes)."""

    def __init__(self, dataset: ShardedDataset, order: SampleOrder):
        self._dataset = dataset
        self._order = order

    def __getitem__(self, positions: np.ndarray) -> Batch | DataError:
        try:
            images, labels = self._dataset.read(self._order.sample_ids(positions))
        except DataError as error:
            return error
        return Batch(images, labels, torch.from_numpy(positions))


def _from_thread(reader: _Reader, positions: Iterator[np.ndarray], prefetch: int) -> Generator[Batch]:
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


def _from_workers(reader: _Reader, positions: Iterator[np.ndarray], workers: int, prefetch: int) -> Generator[Batch]:
    loader = DataLoader(
        reader,
        batch_size=None,
        sampler=positions,
        num_workers=workers,
        prefetch_factor=-(-prefetch // workers),
        worker_init_fn=_leave_signals_to_trainer,
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


def _leave_signals_to_trainer(_: int) -> None:
    """A stop signal often reaches the whole process group; the trainer still needs its data to finish the step."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
