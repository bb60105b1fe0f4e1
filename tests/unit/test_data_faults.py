"""Training data from stores that fail: the very batches of a healthy one, in bounded time."""

import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from faulty_store import FAULTS, MIXED, FaultyStore, served

from data_pipeline import loader, storage
from data_pipeline.cache import CacheOptions
from data_pipeline.errors import DataError
from data_pipeline.generated import write_latents
from data_pipeline.loader import Batch, BatchStream, ReadOptions, open_dataset, stream
from data_pipeline.storage import StorageSettings

SAMPLES, SHARDS, BATCH, STEPS = 400, 40, 16, 30  # more than an epoch
LONGEST_S = 60.0  # a healthy store takes one second
FULL = pytest.mark.full


class Case(NamedTuple):
    """How a store fails."""

    share: float  # of its requests
    kinds: tuple[str, ...]


CASES = {
    "failing": Case(0.2, FAULTS),
    "throttled": Case(0.5, ("503", "429", "slow", "slow")),
    "another object": Case(0.1, ("other",)),
    "another body": Case(0.1, (MIXED,)),
    "everything": Case(0.2, (*FAULTS, MIXED)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "latents"
    write_latents(str(folder), SAMPLES, SHARDS)
    return folder


@pytest.fixture
def store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    monkeypatch.setattr(loader, "AHEAD_BYTES", 2 * 2**20)  # or most of the data would be asked for at once
    storage.configure(StorageSettings(timeout_s=0.4, retry_budget_s=20.0, parallel=8))
    with served(**{path.name: path.read_bytes() for path in folder.iterdir()}) as store:
        yield store
    storage.configure(StorageSettings())


def open_stream(url: str, cache: CacheOptions, **more: Any) -> BatchStream:
    keys: dict[str, Any] = {"seed": 3, "start": 5, "global_batch": BATCH, "micro_batch": BATCH, "rank": 0, "world": 1}
    return stream(open_dataset(url, "train", cache=cache), **keys, prefetch=3, window=150, **more)


@pytest.fixture(scope="module")
def healthy(folder: Path) -> list[Batch]:
    with open_stream(str(folder), CacheOptions(limit=0), workers=0) as batches:
        return list(islice(batches, STEPS))


@pytest.mark.parametrize(
    ("name", "workers", "limit"),
    [
        *[(name, 0, limit) for name in CASES for limit in (2**28, 0)],
        ("everything", 2, 2**28),
        *[pytest.param(name, 2, limit, marks=FULL) for name in CASES for limit in (2**28, 0)],
    ],
)
def test_batches_of_a_faulty_store_are_those_of_a_healthy_one(
    store: FaultyStore, healthy: list[Batch], tmp_path: Path, name: str, workers: int, limit: int
):
    store.share, store.kinds = CASES[name]
    start = time.monotonic()
    with open_stream(store.url, CacheOptions(str(tmp_path / "cache"), limit), workers=workers) as batches:
        found = list(islice(batches, STEPS))
        counted = batches.statistics
    assert time.monotonic() - start < LONGEST_S
    for one, other in zip(found, healthy, strict=True):
        assert torch.equal(one.sample_ids, other.sample_ids) and torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    assert counted["replaced"] == 0 and store.failed > 3
    assert counted["retries"] > 0 or name == "another body"


@pytest.mark.parametrize("limit", [2**28, 0])
def test_objects_whose_first_answers_are_wrong_are_read_right(
    store: FaultyStore, healthy: list[Batch], tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
):
    """The look at a shard and its first bytes both come from another object, so that one is remembered at first."""
    asked: Counter[str] = Counter()

    def wrong_at_first(self: FaultyStore, about: tuple[str, str, int, int]) -> str:
        asked[about[1]] += 1
        return "other" if about[1].endswith(".tar") and asked[about[1]] <= 2 else ""

    monkeypatch.setattr(FaultyStore, "next_fault", wrong_at_first)
    with open_stream(store.url, CacheOptions(str(tmp_path / "cache"), limit), workers=0) as batches:
        found = list(islice(batches, STEPS))
    assert batches.statistics["replaced"] == 0
    for one, other in zip(found, healthy, strict=True):
        assert torch.equal(one.sample_ids, other.sample_ids) and torch.equal(one.images, other.images)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=FULL)])
def test_a_lost_shard_of_a_failing_store_is_told_or_replaced_alike(
    store: FaultyStore, healthy: list[Batch], tmp_path: Path, workers: int
):
    cache = CacheOptions(str(tmp_path / "cache"), 2**28)
    del store.objects["train-000002.tar"]
    store.share, store.kinds = CASES["failing"]
    with open_stream(store.url, cache, workers=workers) as batches:
        with pytest.raises(DataError, match=r"^sample '\d+' is lost: .*train-000002\.tar|train-000002\.tar.* HTTP 404"):
            list(islice(batches, STEPS))
    found = []
    for _ in range(2):
        options = ReadOptions(max_corrupt_share=0.5, on_lost_shard="replace")
        with open_stream(store.url, cache, workers=workers, options=options) as batches:
            found.append(list(islice(batches, STEPS)))
    for one, other, whole in zip(*found, healthy, strict=True):
        lost = whole.sample_ids // (SAMPLES // SHARDS) == 2
        assert torch.equal(one.sample_ids, other.sample_ids) and torch.equal(one.images, other.images)
        assert torch.equal(one.sample_ids[~lost], whole.sample_ids[~lost])
        assert not (one.sample_ids // (SAMPLES // SHARDS) == 2).any()
