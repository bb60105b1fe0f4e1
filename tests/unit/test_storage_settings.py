"""How stores are asked: said in the run description, and done in every process that reads for the run."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_store import FaultyStore, served

from data_pipeline import storage
from data_pipeline.errors import DataError
from data_pipeline.generated import write_latents
from data_pipeline.loader import ShardedDataset, open_dataset, stream
from data_pipeline.parallel import ordered
from data_pipeline.storage import StorageSettings
from sctrain.building import use_storage
from sctrain.config.schema import RunConfig

IMPATIENT = StorageSettings(timeout_s=0.5, retry_budget_s=1.5, parallel=3)
LONG = 60.0  # seconds, far below the budget that a process has by itself


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    storage.configure(StorageSettings())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FaultyStore]:
    write_latents(str(tmp_path / "latents"), 24, 1)
    files = {path.name: path.read_bytes() for path in (tmp_path / "latents").iterdir()}
    with served(**files) as store:
        yield store


def config(tmp_path: Path, **about: Any) -> RunConfig:
    data = {"url": str(tmp_path), "storage": about}
    keys = {"name": "run", "run_dir": tmp_path / "run", "batch": {"global_size": 8}, "budget_images": 8}
    return RunConfig.model_validate({**keys, "data": data, "network": {}, "objective": {"name": "ect"}})


def test_the_description_says_how(tmp_path: Path, store: FaultyStore):
    use_storage(config(tmp_path))
    assert storage.settings() == StorageSettings()
    use_storage(config(tmp_path, timeout_seconds=0.5, retry_budget_seconds=1.5, parallel=3))
    assert storage.settings() == IMPATIENT
    storage.size_of(f"{store.url}/dataset.json")
    asked = len(store.asked)
    use_storage(config(tmp_path, timeout_seconds=0.5, retry_budget_seconds=1.5, parallel=3))
    storage.size_of(f"{store.url}/dataset.json")
    assert len(store.asked) == asked  # nothing was given up or forgotten for what is so already


@pytest.mark.parametrize("wrong", [{"timeout_seconds": 0}, {"retry_budget_seconds": -1}, {"parallel": 0}, {"x": 1}])
def test_what_cannot_be_is_refused(tmp_path: Path, wrong: dict[str, float]):
    with pytest.raises(ValueError, match=f"storage.{next(iter(wrong))}"):
        config(tmp_path, **wrong)


def opened(store: FaultyStore, tmp_path: Path) -> ShardedDataset:
    dataset = open_dataset(store.url, "train")
    store.share, store.kinds = 1.0, ("503",)
    return dataset


def test_a_worker_of_the_loader_is_as_patient_as_its_run(store: FaultyStore, tmp_path: Path):
    storage.configure(IMPATIENT)
    keys: dict[str, Any] = {
        "seed": 0,
        "start": 0,
        "global_batch": 8,
        "micro_batch": 8,
        "rank": 0,
        "world": 1,
        "prefetch": 1,
    }
    start = time.monotonic()
    with stream(opened(store, tmp_path), **keys, workers=1, window=24) as batches:
        with pytest.raises(DataError, match=r"cannot be read( after [12] s of trying)? \(HTTP 503\)"):
            next(batches)
    assert time.monotonic() - start < LONG


def test_processes_of_other_work_are_as_patient_as_their_parent(store: FaultyStore):
    storage.configure(IMPATIENT)
    store.share, store.kinds = 1.0, ("503",)
    start = time.monotonic()
    with pytest.raises(DataError, match=r"cannot be read( after [12] s of trying)? \(HTTP 503\)"):
        list(ordered(storage.size_of, [f"{store.url}/dataset.json"], processes=2))
    assert time.monotonic() - start < LONG


def test_no_more_requests_at_once_than_allowed_whoever_asks(monkeypatch: pytest.MonkeyPatch):
    storage.configure(StorageSettings(parallel=3))
    at_once, most, lock = 0, 0, threading.Lock()

    def counting(self: FaultyStore, asked: tuple[str, str, int, int]) -> str:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.02)
        with lock:
            at_once -= 1
        return ""

    monkeypatch.setattr(FaultyStore, "next_fault", counting)
    with served(**{f"object{number}": bytes(100_000) for number in range(10)}) as store:
        ranges = [(0, 10), (50_000, 10)]
        readers = [
            threading.Thread(target=storage.read_ranges, args=(f"{store.url}/object{number}", ranges))
            for number in range(10)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    assert most == 3
