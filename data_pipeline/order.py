"""The order of samples: a pure function of (seed, shard sizes, window), with no rank or worker in it.

Position p of the endless global sequence lies in epoch p // N. Within an epoch the shards are permuted and the
samples of the permuted shards are then shuffled in consecutive blocks of `window`, so a block touches few shards; where
N <= window this is a full permutation. Ranks and workers only decide who fetches a position.
"""

from collections.abc import Iterator

import numpy as np

CACHED_EPOCHS = 2  # a batch may straddle two


class SampleOrder:
    """Maps positions of the endless sequence to sample ids (rows of the index)."""

    def __init__(self, shard_counts: np.ndarray, seed: int, window: int):
        """`shard_counts` (S,): samples per shard; `window`: samples shuffled together, at least 1."""
        assert window >= 1 and shard_counts.sum() > 0
        self._counts = shard_counts.astype(np.int64)
        self._seed = seed
        self._window = window
        self._epochs: dict[int, np.ndarray] = {}

    def sample_ids(self, positions: np.ndarray) -> np.ndarray:
        """Sample ids (B,) int64 of the global `positions` (B,) int64, each >= 0."""
        epochs, within = np.divmod(positions, self._counts.sum())
        ids = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self._epoch(int(epoch))[within[here]]
        return ids

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            while len(self._epochs) >= CACHED_EPOCHS:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = epoch_order(self._counts, self._seed, epoch, self._window)
        return self._epochs[epoch]


def epoch_order(shard_counts: np.ndarray, seed: int, epoch: int, window: int) -> np.ndarray:
    """The sample ids (N,) of one epoch in order: a permutation of range(N)."""
    bits = random_bits(seed, epoch)
    shards = random_permutation(bits, len(shard_counts))
    counts = shard_counts[shards]
    first_ids = (np.cumsum(shard_counts) - shard_counts)[shards]
    first_places = np.cumsum(counts) - counts
    ids = np.arange(counts.sum()) + np.repeat(first_ids - first_places, counts)
    blocks = np.arange(len(ids)) // window
    return ids[np.lexsort((bits.random_raw(len(ids)), blocks))]


def random_bits(seed: int, stream: int) -> np.random.Philox:
    """The generator of one stream of a seed (each taken modulo 2^64)."""
    return np.random.Philox(key=np.array([seed % 2**64, stream % 2**64], np.uint64))


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
