"""Streaming from a server: the same batches as from files, each span fetched once, through damage and loss."""

import logging
import os
import random
import re
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from range_server import Store, served

from data_pipeline import loader, storage
from data_pipeline.cache import CacheOptions
from data_pipeline.dataset import REQUEST_WORTH, ShardedDataset, as_tensor
from data_pipeline.errors import DataError
from data_pipeline.generated import write_latents
from data_pipeline.index import SPAN_BYTES
from data_pipeline.loader import MOST_TOLD, BatchStream, ReadOptions, open_dataset, stream
from data_pipeline.order import SampleOrder, random_bits
from data_pipeline.reader import LATENT_NOISE
from data_pipeline.storage import StorageSettings

SAMPLES, BATCH, STEPS = 1000, 24, 50  # more than an epoch
SEED, WINDOW, START = 5, 300, 17
SHARDS = 4
LIMIT = 2**28


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "latents"
    write_latents(str(folder), SAMPLES, SHARDS, "mean_std")
    return folder


@pytest.fixture(autouse=True)
def near_ahead(monkeypatch: pytest.MonkeyPatch):
    """Or most of the data would be asked for in each test."""
    monkeypatch.setattr(loader, "AHEAD_BYTES", 4 * 2**20)


@pytest.fixture
def store(folder: Path) -> Iterator[Store]:
    with served(folder) as store:
        yield store


def opened(store: Store, tmp_path: Path, limit: int = LIMIT) -> ShardedDataset:
    return open_dataset(store.url, "train", cache=CacheOptions(str(tmp_path / "cache"), limit))


def open_stream(dataset: ShardedDataset, **changed: Any) -> BatchStream:
    options = {"seed": SEED, "start": START, "global_batch": BATCH, "micro_batch": BATCH, "rank": 0, "world": 1}
    return stream(dataset, **(options | {"workers": 0, "prefetch": 3, "window": WINDOW} | changed))


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[torch.Tensor, np.ndarray]:
    """Latents (STEPS * BATCH, C, H, W) and sample ids, by the definitions."""
    dataset = open_dataset(str(folder), "train")
    positions = np.arange(START, START + STEPS * BATCH)
    ids = SampleOrder(dataset.index, SEED, WINDOW).sample_ids(positions)
    stored, _ = dataset.decode(ids, dataset.fetcher().read(ids), dataset.fetcher())
    noise = [
        np.random.Generator(random_bits(SEED, position, LATENT_NOISE)).standard_normal((4, 64, 64), dtype=np.float32)
        for position in positions.tolist()
    ]
    return as_tensor(stored, dataset.description, np.stack(noise)), ids


FULL = pytest.mark.full


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize(
    ("world", "workers"),
    [
        *[(1, 0), (2, 0), (3, 0), (4, 0), (1, 3)],
        *[
            pytest.param(world, workers, marks=FULL)
            for world in (1, 2, 3, 4)
            for workers in (1, 3)
            if world * workers != 3
        ],
    ],
)
def test_uninterrupted_equals_killed_and_resumed(
    store: Store, tmp_path: Path, expected: tuple[torch.Tensor, np.ndarray], world: int, workers: int
):
    """50 steps, left behind without a word at a random one and taken up on another number of ranks and workers."""
    dataset, stop = opened(store, tmp_path), random.Random(world).randrange(1, STEPS)
    first = open_stream(dataset)
    before = list(islice(first, stop))
    ranks = []
    for rank in range(world):
        shared = {"start": START + stop * BATCH, "micro_batch": BATCH // world, "rank": rank, "world": world}
        with open_stream(dataset, **shared, workers=workers) as batches:
            ranks.append(list(islice(batches, STEPS - stop)))
    first.close()
    parts = before + [rank[turn] for turn in range(STEPS - stop) for rank in ranks]
    assert torch.cat([part.positions for part in parts]).tolist() == list(range(START, START + STEPS * BATCH))
    assert torch.cat([part.sample_ids for part in parts]).tolist() == expected[1].tolist()
    assert torch.equal(torch.cat([part.labels for part in parts]), torch.from_numpy(expected[1] % 10))
    assert torch.equal(torch.cat([part.images for part in parts]), expected[0])
    spans = {asked: count for asked, count in store.asked.items() if asked[0].endswith(".tar")}
    assert set(spans.values()) == {1} and len(spans) == len(dataset.index.span_counts)  # over all ranks and starts


def test_opening_asks_a_web_server_for_no_shard(store: Store, tmp_path: Path):
    before = storage.statistics()["requests"]
    opened(store, tmp_path)
    assert {name for name, _, _ in store.asked} == {"dataset.json", "index-train.npz"}
    assert storage.statistics()["requests"] - before <= 6  # two looks at each, and its bytes


def test_what_is_counted(store: Store, tmp_path: Path):
    dataset = opened(store, tmp_path)
    with open_stream(dataset) as batches:
        list(islice(batches, 2 * SAMPLES // BATCH))
        counted = dict(batches.statistics)
    spans = len(dataset.index.span_counts)
    assert counted["cache_fetched"] == spans <= counted["requests"] <= spans + 3 * SHARDS  # and some for sizes
    assert counted["bytes"] == dataset.index.size.sum()
    assert counted["samples"] == counted["cache_hits"] + counted["cache_misses"] == 2 * SAMPLES // BATCH * BATCH
    assert counted["cache_hits"] > 1000 and counted["replaced"] == 0 and 0 < counted["decode_seconds"] < 20
    with open_stream(dataset) as batches:  # another run: all is here
        list(islice(batches, 10))
        assert batches.statistics["requests"] == batches.statistics["cache_misses"] == 0


def test_when_samples_are_asked_for_one_by_one(
    store: Store, tmp_path: Path, expected: tuple[torch.Tensor, np.ndarray], caplog: pytest.LogCaptureFixture
):
    """Without a cache, with one that is too small for the window, or where many machines share every span."""
    dataset = opened(store, tmp_path, limit=0)
    assert not opened(store, tmp_path, limit=10 * SPAN_BYTES).reads_spans(WINDOW, nodes=1)
    assert dataset.index.mean_bytes * 4 > REQUEST_WORTH
    assert [opened(store, tmp_path).reads_spans(WINDOW, nodes) for nodes in (1, 4)] == [True, False]
    with caplog.at_level(logging.WARNING), open_stream(opened(store, tmp_path, limit=10 * SPAN_BYTES)):
        assert caplog.messages == [
            "A shuffle window of 300 samples takes 0.0 GiB, the cache may hold 0.0: samples are fetched one by one."
        ]
    for workers in (0, 1):
        with open_stream(dataset, workers=workers) as batches:
            parts = list(islice(batches, 5))
        assert torch.equal(torch.cat([part.images for part in parts]), expected[0][: 5 * BATCH])
    assert not (tmp_path / "cache").exists()
    assert max(last - first for name, first, last in store.asked if name.endswith(".tar")) < SPAN_BYTES // 4


def test_reading_in_order_joins_neighbours(store: Store, tmp_path: Path, folder: Path):
    dataset, ids = opened(store, tmp_path), np.arange(200, 700)
    images, labels = dataset.read(ids)
    assert torch.equal(images, open_dataset(str(folder), "train").read(ids)[0]) and torch.equal(
        labels[:10], torch.arange(10)
    )
    assert sum(count for asked, count in store.asked.items() if asked[0].endswith(".tar")) < 20


def test_spoiled_entries_are_noticed_and_replaced(
    store: Store, tmp_path: Path, expected: tuple[torch.Tensor, np.ndarray]
):
    dataset = opened(store, tmp_path)
    with open_stream(dataset) as batches:
        list(islice(batches, STEPS))
    entries = sorted(path for path in (tmp_path / "cache").rglob("*") if path.name.isdigit())
    assert len(entries) == len(dataset.index.span_counts)
    for entry in entries[:2]:
        entry.write_bytes(bytes(entry.stat().st_size))
    os.truncate(entries[2], 1000)
    with open_stream(dataset) as batches:
        parts = list(islice(batches, STEPS))
        counted = batches.statistics
    assert torch.equal(torch.cat([part.images for part in parts]), expected[0])
    assert counted["cache_spoiled"] == counted["cache_fetched"] == 3 and counted["replaced"] == 0
    assert all(entry.read_bytes().count(0) < entry.stat().st_size // 2 for entry in entries)


def test_the_next_spans_are_on_their_way(store: Store, tmp_path: Path):
    """While the first batch is waited for, the threads of its process fetch what comes after it."""
    with open_stream(opened(store, tmp_path), window=200) as batches:
        first = next(batches)
        needed, until = len(np.unique(first.sample_ids.numpy() // 60)), time.monotonic() + 20
        while len({asked for asked in store.asked.copy() if asked[0].endswith(".tar")}) <= needed:
            assert time.monotonic() < until
            time.sleep(0.01)


def with_damage(folder: Path, tmp_path: Path, samples: list[int]) -> Path:
    """A copy (by links) in which one byte of every named sample is another."""
    copy, index = tmp_path / "damaged", open_dataset(str(folder), "train").index
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).hardlink_to(path)
    for name in {index.shard_name(sample) for sample in samples}:
        content = bytearray((copy / name).read_bytes())
        for sample in samples:
            if index.shard_name(sample) == name:
                content[index.offset[sample] + 5000] ^= 1
        (copy / name).unlink()
        (copy / name).write_bytes(content)
    return copy


DAMAGED = list(range(3, SAMPLES, 40))
TOLERANT = ReadOptions(max_corrupt_share=0.1)


@pytest.mark.parametrize(("limit", "steps"), [(LIMIT, STEPS), (0, 8)])
def test_damaged_samples_are_replaced_alike_everywhere(
    folder: Path,
    tmp_path: Path,
    expected: tuple[torch.Tensor, np.ndarray],
    limit: int,
    steps: int,
    caplog: pytest.LogCaptureFixture,
):
    with served(with_damage(folder, tmp_path, DAMAGED)) as store, caplog.at_level(logging.WARNING):
        found = []
        for world in (1, 2):
            ranks = []
            for rank in range(world):
                shared = {"micro_batch": BATCH // world, "rank": rank, "world": world, "options": TOLERANT}
                with open_stream(opened(store, tmp_path, limit), **shared) as batches:
                    ranks.append(list(islice(batches, steps)))
            found.append([rank[turn] for turn in range(steps) for rank in ranks])
    one, two = (
        [torch.cat([getattr(part, name) for part in parts]) for name in ("sample_ids", "images", "labels")]
        for parts in found
    )
    assert all(torch.equal(mine, other) for mine, other in zip(one, two, strict=True))
    wanted, images = expected[1][: steps * BATCH], expected[0][: steps * BATCH]
    damaged = np.isin(wanted, DAMAGED)
    assert damaged.sum() >= 4 and not np.isin(one[0].numpy(), DAMAGED).any()
    assert (one[0].numpy() == wanted)[~damaged].all() and torch.equal(one[1][~damaged], images[~damaged])
    assert len(set(one[0][damaged].tolist())) > 2  # each by one of its own
    assert torch.equal(one[2], one[0] % 10)
    sentences = [problem for part in found[0] for problem in part.damaged]
    assert len(sentences) == damaged.sum() == sum(part.statistics["replaced"] for part in found[0])
    sample = wanted[damaged][0]
    start = f"{store.url}/train-{sample // 250:06d}.tar: sample '{sample:07d}' is damaged (its checksum does not match"
    assert sentences[0].startswith(start)
    told = [record.getMessage().endswith("Another sample takes its place.") for record in caplog.records]
    assert told == [True] * (2 * damaged.sum())


def test_too_many_damaged_samples_stop_the_run(folder: Path, tmp_path: Path):
    with served(with_damage(folder, tmp_path, list(range(0, SAMPLES, 20)))) as store:  # 5%
        dataset = opened(store, tmp_path)
        with (
            open_stream(dataset) as batches,
            pytest.raises(
                DataError,
                match=r"^11 of \d+ samples .* and max_corrupt_share is 0.001; the last: http.*'\d+' is damaged",
            ),
        ):
            list(islice(batches, STEPS))
        with (
            open_stream(dataset, options=ReadOptions(max_corrupt_share=0.0)) as batches,
            pytest.raises(DataError, match=r"^\d of \d\d samples"),
        ):
            list(islice(batches, STEPS))
        with open_stream(dataset, options=ReadOptions(max_corrupt_share=0.1)) as batches:
            list(islice(batches, STEPS))
            assert batches.statistics["replaced"] > 40


@pytest.mark.parametrize(("limit", "steps"), [(LIMIT, STEPS), (0, 25)])
def test_a_lost_shard_stops_the_run_or_is_replaced(
    store: Store,
    tmp_path: Path,
    expected: tuple[torch.Tensor, np.ndarray],
    limit: int,
    steps: int,
    caplog: pytest.LogCaptureFixture,
):
    dataset = opened(store, tmp_path, limit)
    store.lost.add("train-000002.tar")
    with open_stream(dataset) as batches, pytest.raises(DataError, match=r"train-000002\.tar .*404") as caught:
        list(islice(batches, STEPS))
    assert "\n" not in str(caught.value)
    caplog.clear()
    with open_stream(dataset, options=ReadOptions(max_corrupt_share=0.5, on_lost_shard="replace")) as batches:
        parts = list(islice(batches, steps))
    told = [record.getMessage() for record in caplog.records]
    ids = torch.cat([part.sample_ids for part in parts]).numpy()
    wanted = expected[1][: steps * BATCH]
    lost = wanted // 250 == 2
    assert (ids == wanted).tolist() == (~lost).tolist() and not (ids // 250 == 2).any()
    assert sum(part.statistics["replaced"] for part in parts) == lost.sum()
    assert len(told) == min(lost.sum(), MOST_TOLD + 1) > 10
    assert re.match(r"sample '0000[567]\d\d' is lost: http.*train-000002\.tar .*404", told[0])


def test_a_store_that_is_away_is_no_damage(store: Store, tmp_path: Path):
    dataset = opened(store, tmp_path)
    away = ShardedDataset("http://127.0.0.1:1", "train", dataset.description, dataset.index, dataset.cache)
    storage.configure(StorageSettings(timeout_s=0.3, retry_budget_s=1))
    try:
        with open_stream(away, options=ReadOptions(False, 1.0, "replace")) as batches:
            with pytest.raises(DataError, match="cannot be read"):
                next(batches)
    finally:
        storage.configure(StorageSettings())
