"""A bucket behind a proxy that fails: see test_storage_s3.py for how to name the bucket. Its store must speak http."""

import io
import os
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from bucket import BASE, bucket_folder
from fault_proxy import ANOTHER, BODY, READING, FaultProxy, proxied
from preparing import write_photos

from data_pipeline import loader, storage
from data_pipeline.cache import CacheOptions
from data_pipeline.encoding import Output
from data_pipeline.errors import DataError
from data_pipeline.generated import write_latents
from data_pipeline.loader import Batch, BatchStream, ReadOptions, open_dataset, stream
from data_pipeline.sources.folder import prepare_folder
from data_pipeline.storage import StorageSettings, delete, join_url, list_url, open_url, write_object

ENDPOINT = os.environ.get("AWS_ENDPOINT_URL", "")
pytestmark = pytest.mark.skipif(
    not (BASE and ENDPOINT.startswith("http://")),
    reason="SCTRAIN_TEST_S3_URL names no bucket, or AWS_ENDPOINT_URL no store without encryption",
)
SAMPLES, SHARDS, BATCH, STEPS = 240, 24, 16, 16  # more than an epoch
LONGEST_S = 90.0
CASES = {
    "failing": (0.2, READING),
    "throttled": (0.5, ("slowdown", "slow")),
    "another object": (0.2, (ANOTHER,)),
    "another body": (0.2, (BODY,)),
    "everything": (0.2, (*READING, ANOTHER, BODY)),
}


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A folder of the bucket with latents in it, removed in the end."""
    with bucket_folder() as folder:
        write_latents(join_url(folder, "latents"), SAMPLES, SHARDS)
        yield folder


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    monkeypatch.setattr(loader, "AHEAD_BYTES", 2 * 2**20)  # or most of the data would be asked for at once
    with proxied(ENDPOINT) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage.configure(StorageSettings(timeout_s=0.6, retry_budget_s=30.0, parallel=8))
        yield proxy
    monkeypatch.undo()
    storage.configure(StorageSettings())


def open_stream(url: str, cache: CacheOptions, **more: Any) -> BatchStream:
    keys: dict[str, Any] = {"seed": 3, "start": 5, "global_batch": BATCH, "micro_batch": BATCH, "rank": 0, "world": 1}
    return stream(open_dataset(url, "train", cache=cache, tolerate_loss=True), **keys, prefetch=3, window=150, **more)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> list[Batch]:
    folder = str(tmp_path_factory.mktemp("data") / "latents")
    write_latents(folder, SAMPLES, SHARDS)
    with open_stream(folder, CacheOptions(limit=0), workers=0) as batches:
        return list(islice(batches, STEPS))


@pytest.mark.parametrize("limit", [2**28, 0])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", CASES)
def test_batches_through_faults_are_those_of_a_healthy_store(
    bucket: str, proxy: FaultProxy, healthy: list[Batch], tmp_path: Path, name: str, workers: int, limit: int
):
    proxy.share, proxy.reading = CASES[name]
    start, cache = time.monotonic(), CacheOptions(str(tmp_path / "cache"), limit)
    with open_stream(join_url(bucket, "latents"), cache, workers=workers) as batches:
        found = list(islice(batches, STEPS))
        counted = batches.statistics
    assert time.monotonic() - start < LONGEST_S
    for one, other in zip(found, healthy, strict=True):
        assert torch.equal(one.sample_ids, other.sample_ids) and torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    assert counted["replaced"] == 0 and proxy.failed.total() > 3
    assert counted["retries"] > 0 or name == "another body"


def test_a_lost_shard_is_told_or_replaced(bucket: str, proxy: FaultProxy, healthy: list[Batch], tmp_path: Path):
    proxy.share, proxy.lost = 0.2, {"train-000002.tar"}
    url, cache = join_url(bucket, "latents"), CacheOptions(str(tmp_path / "cache"), 2**28)
    with open_stream(url, cache, workers=0) as batches:
        with pytest.raises(DataError, match=r"train-000002\.tar .*404"):
            list(islice(batches, STEPS))
    options = ReadOptions(max_corrupt_share=0.5, on_lost_shard="replace")
    with open_stream(url, cache, workers=0, options=options) as batches:
        found = list(islice(batches, STEPS))
    for one, whole in zip(found, healthy, strict=True):
        lost = whole.sample_ids // (SAMPLES // SHARDS) == 2
        assert torch.equal(one.sample_ids[~lost], whole.sample_ids[~lost])
        assert not (one.sample_ids // (SAMPLES // SHARDS) == 2).any()


def test_objects_are_written_whole_through_faults(bucket: str, proxy: FaultProxy):
    proxy.share = 0.3
    contents = {f"written/{size}": random.Random(size).randbytes(size) for size in (0, 10, 100_000, 40_000_000)}
    start = time.monotonic()
    for name, content in contents.items():
        write_object(join_url(bucket, name), io.BytesIO(content))
    for number in range(20):
        write_object(join_url(bucket, f"written/many-{number}"), b"%d" % number)
    assert time.monotonic() - start < LONGEST_S and proxy.failed.total() > 3
    proxy.share = 0.0
    for name, content in contents.items():
        assert open_url(join_url(bucket, name)).read() == content
    assert [open_url(join_url(bucket, f"written/many-{number}")).read() for number in range(20)] == [
        b"%d" % number for number in range(20)
    ]
    proxy.share = 0.3
    delete(list_url(join_url(bucket, "written")))
    proxy.share = 0.0
    assert list_url(join_url(bucket, "written")) == []


def test_a_data_set_is_prepared_straight_to_a_bucket_through_faults(bucket: str, proxy: FaultProxy, tmp_path: Path):
    write_photos(tmp_path / "photos", 60, (12, 10))
    output = Output(samples_per_shard=8)
    whole, url = tmp_path / "whole", join_url(bucket, "prepared")
    prepare_folder(tmp_path / "photos", whole, 8, output=output)
    proxy.share = 0.2
    prepare_folder(tmp_path / "photos", url, 8, output=output)
    assert proxy.failed.total() > 3
    proxy.share = 0.0
    names = sorted(path.name for path in whole.iterdir())
    assert list_url(url) == [join_url(url, name) for name in names]  # and no records of its writing
    for name in names:
        assert open_url(join_url(url, name)).read() == (whole / name).read_bytes()
