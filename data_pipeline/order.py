"""The order of samples: a pure function of (seed, sizes in the index, window), with no rank or worker in it.

Position p of the endless global sequence lies in epoch p // N. Within an epoch the spans (runs of samples of a few MiB,
see `ShardIndex.span_starts`) are permuted and their samples laid out in that order; the sample at place i then gets the
key i + U(0, window), and sorting by key gives the order. So samples of a span spread over `window` positions, spans
enter and leave one by one, and what is in use at once is bounded by the window. Where N <= window the order is a full
permutation. Ranks and workers only decide who fetches a position.
"""

from collections.abc import Iterator

import numpy as np

from data_pipeline.index import ShardIndex

CACHED_EPOCHS = 2  # a batch may straddle two


class SampleOrder:
    """Maps positions of the endless sequence to sample ids (rows of the index)."""

    def __init__(self, index: ShardIndex, seed: int, window: int):
        """`window`: over how many positions neighbours are spread, at least 1."""
        assert window >= 1
        self._samples = len(index)
        self._counts = index.shard_counts, index.span_counts
        self._seed = seed
        self._window = window
        self._epochs: dict[int, np.ndarray] = {}

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """Sample ids (B,) int64 of the global `positions` (B,) int64, each >= 0."""
        epochs, within = np.divmod(positions, self._samples)
        ids = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self._epoch(int(epoch))[within[here]]
        return ids

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            while len(self._epochs) >= CACHED_EPOCHS:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = epoch_order(*self._counts, self._seed, epoch, self._window)
        return self._epochs[epoch]


def epoch_order(shard_counts: np.ndarray, span_counts: np.ndarray, seed: int, epoch: int, window: int) -> np.ndarray:
    """The sample ids (N,) of one epoch in order: a permutation of range(N).

    `shard_counts` (S,) and `span_counts` (M,): samples of each shard and of each span, both summing to N.
    """
    bits = random_bits(seed, epoch)
    samples = int(shard_counts.sum())
    if samples <= window:
        ids = _laid_out(shard_counts, random_permutation(bits, len(shard_counts)))
        return ids[random_permutation(bits, samples)]
    ids = _laid_out(span_counts, random_permutation(bits, len(span_counts)))
    shifts = (bits.random_raw(samples) >> np.uint64(11)) * (_spread(samples, window) * 2.0**-53)
    return ids[np.argsort(np.arange(samples) + shifts, kind="stable")]


def _spread(samples: int, window: int) -> float:
    """Over how many places a sample may move.

    Neighbours share a batch of B with probability B/V (N + V)/N, where the second factor comes from the thin ends of
    the epoch. So below two windows V is larger than the window, which keeps the probability at 1.5 B/window.
    """
    return float(window) if samples >= 2 * window else window * samples / (1.5 * samples - window)


def _laid_out(counts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Ids of runs of `counts` samples that follow each other in `order`."""
    first_ids = (np.cumsum(counts) - counts)[order]
    counts = counts[order]
    first_places = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(first_ids - first_places, counts)


def random_bits(seed: int, stream: int, purpose: int = 0) -> np.random.Philox:
    """The generator of one stream of a seed (each taken modulo 2^64); streams of other purposes are independent."""
    key = np.array([seed % 2**64, stream % 2**64], np.uint64)
    return np.random.Philox(key=key, counter=[0, 0, 0, purpose])


def random_permutation(bits: np.random.Philox, count: int) -> np.ndarray:
    """A permutation of range(count); unlike `Generator.permutation`, sorting raw bits is the same in every numpy."""
    return np.argsort(bits.random_raw(count), kind="stable")


def micro_batch_positions(
    start: int, global_batch: int, micro_batch: int, rank: int, world: int
) -> Iterator[np.ndarray]:
    """Endlessly, the positions (micro_batch,) int64 of one rank's successive micro-batches.

    Optimizer step k consumes [start + k*B, start + (k+1)*B) with B = global_batch; micro-batch j of rank r inside it is
    the contiguous run that begins at (j*world + r) * micro_batch. ValueError where B is not a multiple of
    world * micro_batch.
    """
    if micro_batch < 1 or global_batch < 1 or global_batch % (world * micro_batch):
        raise ValueError(f"{global_batch=} is not a positive multiple of {world=} times {micro_batch=}")
    assert start >= 0 and 0 <= rank < world
    return _positions(start, micro_batch, rank, world)


def _positions(start: int, micro_batch: int, rank: int, world: int) -> Iterator[np.ndarray]:
    # Steps follow each other without a gap and B is a multiple of the stride, so the runs of a rank are evenly spaced.
    first = start + rank * micro_batch
    while True:
        yield np.arange(first, first + micro_batch, dtype=np.int64)
        first += world * micro_batch
