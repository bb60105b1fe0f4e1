"""The order of samples: permutations, locality, and who fetches what."""

from itertools import islice

import numpy as np
import pytest

from data_pipeline.order import SampleOrder, epoch_order, micro_batch_positions

COUNTS = np.array([7, 1, 0, 12, 5, 9])  # 34 samples, shards of unequal size, one empty
SHARD_OF = np.repeat(np.arange(len(COUNTS)), COUNTS)


@pytest.mark.parametrize("window", [1, 8, 34, 1000])
@pytest.mark.parametrize("epoch", [0, 1, 2**40])
def test_each_epoch_is_a_permutation(window: int, epoch: int):
    assert sorted(epoch_order(COUNTS, 3, epoch, window)) == list(range(34))


def test_order_depends_on_seed_and_epoch_only():
    orders = [tuple(epoch_order(COUNTS, seed, epoch, 1000)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert orders[0] == tuple(epoch_order(COUNTS, 0, 0, 34))


def test_order_never_changes_with_versions():
    # A resumed run relies on it: these were written down once.
    assert epoch_order(COUNTS, 0, 0, 1000)[:8].tolist() == [18, 32, 5, 31, 28, 3, 22, 2]
    assert epoch_order(COUNTS, 5, 2, 8)[:8].tolist() == [13, 15, 11, 14, 9, 12, 10, 8]


def test_window_bounds_the_shuffle():
    """Block b of the shuffled epoch holds exactly the samples of block b of the permuted shards."""
    unshuffled = epoch_order(COUNTS, 3, 0, window=1)
    shuffled = epoch_order(COUNTS, 3, 0, window=8)
    assert not np.array_equal(unshuffled, shuffled)
    for start in range(0, 34, 8):
        assert sorted(unshuffled[start : start + 8]) == sorted(shuffled[start : start + 8])


def test_without_a_window_shards_follow_each_other_whole():
    shards = SHARD_OF[epoch_order(COUNTS, 3, 0, window=1)]
    assert (np.diff(shards) != 0).sum() == 4  # five shards hold samples
    assert not np.array_equal(shards, SHARD_OF)


def test_positions_run_through_epochs():
    order = SampleOrder(COUNTS, 3, 8)
    expected = np.concatenate([epoch_order(COUNTS, 3, epoch, 8) for epoch in range(4)])
    positions = np.arange(4 * 34)
    assert np.array_equal(order.sample_ids(positions), expected)
    jumbled = np.random.default_rng(0).permutation(positions)  # also what leaves the cache and comes back
    assert np.array_equal(order.sample_ids(jumbled), expected[jumbled])


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 24), (1, 4), (2, 12), (2, 4), (3, 8), (3, 2), (4, 6), (4, 3)])
def test_step_consumes_the_same_positions_on_any_world(world: int, micro_batch: int):
    accumulation = 24 // (world * micro_batch)
    ranks = [
        list(islice(micro_batch_positions(48, 24, micro_batch, rank, world), 2 * accumulation)) for rank in range(world)
    ]
    for step in range(2):
        runs = [ranks[rank][step * accumulation + j] for j in range(accumulation) for rank in range(world)]
        assert np.concatenate(runs).tolist() == list(range(48 + 24 * step, 72 + 24 * step))


def test_micro_batch_follows_the_documented_formula():
    got = list(islice(micro_batch_positions(100, 12, 2, rank=1, world=3), 4))  # 2 micro-batches per step
    assert [run.tolist() for run in got] == [[102, 103], [108, 109], [114, 115], [120, 121]]


@pytest.mark.parametrize(("batch", "micro_batch", "world"), [(10, 4, 1), (8, 2, 3), (8, 16, 1), (0, 4, 1), (8, 0, 1)])
def test_batches_that_do_not_divide_are_refused(batch: int, micro_batch: int, world: int):
    with pytest.raises(ValueError, match="multiple"):
        micro_batch_positions(0, batch, micro_batch, 0, world)
