"""The order of samples: permutations, locality, and who fetches what."""

import hashlib
from itertools import islice

import numpy as np
import pytest
from test_data_index import make_index

from data_pipeline.order import SampleOrder, epoch_order, micro_batch_positions

COUNTS = np.array([7, 1, 0, 12, 5, 9])  # 34 samples, shards of unequal size, one empty
SPANS = np.array([4, 3, 1, 5, 5, 2, 5, 8, 1])


@pytest.mark.parametrize("window", [1, 8, 20, 34, 1000])
@pytest.mark.parametrize("epoch", [0, 1, 2**40])
def test_each_epoch_is_a_permutation(window: int, epoch: int):
    assert sorted(epoch_order(COUNTS, SPANS, 3, epoch, window)) == list(range(34))


def test_order_depends_on_seed_and_epoch_only():
    orders = [tuple(epoch_order(COUNTS, SPANS, seed, epoch, 1000)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert orders[0] == tuple(epoch_order(COUNTS, SPANS, 0, 0, 34))


def test_order_never_changes_with_versions():
    # A resumed run relies on it: these were written down once.
    assert epoch_order(COUNTS, SPANS, 0, 0, 1000)[:8].tolist() == [18, 32, 5, 31, 28, 3, 22, 2]
    assert epoch_order(COUNTS, SPANS, 5, 2, 8)[:8].tolist() == [8, 10, 9, 11, 12, 26, 27, 18]
    assert epoch_order(COUNTS, SPANS, 5, 2, 30)[:8].tolist() == [26, 27, 10, 8, 28, 12, 6, 11]


def test_the_digits_keep_their_order():
    """Up to a window of samples it is a full permutation over permuted shards, as it was before there were spans."""
    counts = np.array([256] * 5 + [158])
    ids = epoch_order(counts, counts, 7, 3, 65_536)
    assert (
        hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
        == "3314c1199bb8b62b26f772f656a99e8c6e5df7e369c20603e857e430cb7c5d44"
    )


def test_window_bounds_the_shuffle():
    """A sample leaves its place in the row of permuted spans by less than the window."""
    row = epoch_order(COUNTS, SPANS, 3, 0, window=1)
    shuffled = epoch_order(COUNTS, SPANS, 3, 0, window=8)
    assert not np.array_equal(row, shuffled)
    place = np.argsort(row)[shuffled]
    assert np.abs(place - np.arange(34)).max() < 8


def test_without_a_window_spans_follow_each_other_whole():
    row = epoch_order(COUNTS, SPANS, 3, 0, window=1)
    assert (np.diff(row) != 1).sum() == len(SPANS) - 1
    assert (np.diff(np.repeat(np.arange(len(SPANS)), SPANS)[row]) != 0).sum() == len(SPANS) - 1


SAMPLES, WINDOW, BATCH = 60_000, 8_192, 256
EVEN = np.full(SAMPLES // 40, 40)  # spans; ten to a shard


def epochs(window: int) -> list[np.ndarray]:
    return [epoch_order(EVEN.reshape(-1, 10).sum(1), EVEN, 0, epoch, window) for epoch in range(20)]


@pytest.mark.parametrize("window", [WINDOW, 40_000, SAMPLES])  # 40,000: more than half of the epoch
def test_neighbours_seldom_share_a_batch(window: int):
    batches = [np.argsort(ids) // BATCH for ids in epochs(window)]
    share = np.mean([(batch[1:] == batch[:-1]).mean() for batch in batches])
    assert 0.5 * BATCH / window < share <= 1.5 * BATCH / window


def test_order_does_not_follow_the_input():
    correlations = [np.corrcoef(ids, np.arange(SAMPLES))[0, 1] for ids in epochs(WINDOW)]  # both are ranks
    assert 0 < np.mean(np.abs(correlations)) <= 3 / np.sqrt(len(EVEN))


def test_an_epoch_starts_with_few_spans_and_holds_few_at_once():
    spans = epoch_order(EVEN, EVEN, 0, 0, WINDOW) // 40
    assert len(set(spans[:BATCH].tolist())) <= 1.5 * np.sqrt(2 * BATCH * WINDOW) / 40
    last = {span: place for place, span in enumerate(spans.tolist())}
    first = {span: place for place, span in reversed(list(enumerate(spans.tolist())))}
    held = np.zeros(SAMPLES + 1, np.int64)
    np.add.at(held, list(first.values()), 1)
    np.add.at(held, [place + 1 for place in last.values()], -1)
    assert held.cumsum().max() <= 1.1 * WINDOW / 40
    arrivals = np.bincount(np.array(list(first.values())) // BATCH)
    assert arrivals[0] == arrivals.max()  # no burst later


def test_positions_run_through_epochs():
    index = make_index(34, 3)
    order = SampleOrder(index, 3, 8)
    expected = np.concatenate([epoch_order(index.shard_counts, index.span_counts, 3, epoch, 8) for epoch in range(4)])
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
