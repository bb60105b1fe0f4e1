"""The stream: the same global batches on any number of ranks and workers, exact resume, honest errors, prompt end."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.digits import prepare_digits
from data_pipeline.errors import DataError
from data_pipeline.generated import generated_latents, write_latents
from data_pipeline.loader import Batch, BatchStream, ReadOptions, ShardedDataset, open_dataset, stream
from data_pipeline.order import SampleOrder

BATCH = 24
START = 1416  # the second step crosses into the next epoch of the 1,438 training digits
SEED = 7
WINDOW = 500


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare_digits(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(digits: Path) -> ShardedDataset:
    return open_dataset(str(digits), "train")


def open_stream(
    dataset: ShardedDataset,
    *,
    start: int = START,
    micro_batch: int = BATCH,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    **more: Any,
) -> BatchStream:
    return stream(
        dataset,
        seed=SEED,
        start=start,
        global_batch=BATCH,
        micro_batch=micro_batch,
        rank=rank,
        world=world,
        workers=workers,
        prefetch=3,
        window=WINDOW,
        **more,
    )


def expected(dataset: ShardedDataset, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    order = SampleOrder(dataset.index, SEED, WINDOW)
    return dataset.read(order.sample_ids(np.arange(start, start + count)))


FULL = pytest.mark.full


@pytest.mark.parametrize(
    ("world", "micro_batch", "workers"),
    [
        *[(world, micro_batch, 0) for world, micro_batch in [(1, 24), (1, 8), (2, 6), (3, 4), (4, 6)]],
        (1, 8, 1),
        pytest.param(1, 8, 2, marks=FULL),
        pytest.param(2, 6, 1, marks=FULL),
        pytest.param(3, 4, 1, marks=FULL),
        pytest.param(4, 6, 1, marks=FULL),
    ],
)
def test_same_global_batches_on_any_ranks_and_workers(
    dataset: ShardedDataset, world: int, micro_batch: int, workers: int
):
    accumulation = BATCH // (world * micro_batch)
    steps = 3
    ranks = []
    for rank in range(world):
        with open_stream(dataset, micro_batch=micro_batch, rank=rank, world=world, workers=workers) as batches:
            ranks.append(list(islice(batches, steps * accumulation)))
    parts = [ranks[rank][turn] for turn in range(steps * accumulation) for rank in range(world)]
    images, labels = expected(dataset, START, steps * BATCH)
    assert torch.equal(torch.cat([part.images for part in parts]), images)
    assert torch.equal(torch.cat([part.labels for part in parts]), labels)
    assert torch.cat([part.positions for part in parts]).tolist() == list(range(START, START + steps * BATCH))


@pytest.fixture(scope="module")
def uninterrupted(dataset: ShardedDataset) -> list[Batch]:
    """50 steps, half of the images mirrored."""
    with open_stream(dataset, options=ReadOptions(flip=True)) as batches:
        return list(islice(batches, 50))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize(
    ("world", "workers"),
    [
        *[(world, 0) for world in (1, 2, 3, 4)],
        *[pytest.param(world, workers, marks=FULL) for world in (1, 2, 3, 4) for workers in (1, 3)],
    ],
)
def test_uninterrupted_equals_left_and_resumed(
    dataset: ShardedDataset, uninterrupted: list[Batch], world: int, workers: int
):
    """By keys and by bytes after augmentation: left without a word at a random step, gone on with in another way."""
    stop = random.Random(world + 10 * workers).randrange(1, 50)
    left = open_stream(dataset, options=ReadOptions(flip=True))
    parts = [[batch] for batch in islice(left, stop)]
    ranks = []
    for rank in range(world):
        shared = {"start": START + stop * BATCH, "micro_batch": BATCH // world, "rank": rank, "world": world}
        with open_stream(dataset, **shared, workers=workers, options=ReadOptions(flip=True)) as batches:
            ranks.append(list(islice(batches, 50 - stop)))
    left.close()
    parts += [list(part) for part in zip(*ranks, strict=True)]
    for part, whole in zip(parts, uninterrupted, strict=True):
        for name in ("positions", "sample_ids", "labels", "images"):
            assert torch.equal(torch.cat([getattr(batch, name) for batch in part]), getattr(whole, name)), name


def test_flips_belong_to_positions(dataset: ShardedDataset):
    """Half of the images are mirrored, the same ones on any ranks, in another epoch others."""
    images, _ = expected(dataset, START, 8 * BATCH)
    found = []
    for world in (1, 2):
        ranks = []
        for rank in range(world):
            shared = {"micro_batch": BATCH // world, "rank": rank, "world": world}
            with open_stream(dataset, **shared, options=ReadOptions(flip=True)) as batches:
                ranks.append(list(islice(batches, 8)))
        found.append(torch.cat([rank[turn].images for turn in range(8) for rank in ranks]))
    assert torch.equal(*found)
    flipped = (found[0] == images.flip(3)).flatten(1).all(1)
    assert torch.equal(found[0], torch.where(flipped[:, None, None, None], images.flip(3), images))
    assert 0.35 < flipped.float().mean() < 0.65


def test_latents_have_no_mirror_images(tmp_path: Path):
    write_latents(str(tmp_path / "latents"), 24, 1)
    stored = generated_latents(0, 24)
    latents = open_dataset(str(tmp_path / "latents"), "train")
    with pytest.raises(DataError, match="holds latents, which have no mirror images: switch the flip off"):
        open_stream(latents, options=ReadOptions(flip=True))
    with open_stream(latents) as batches:
        batch = next(batches)
    assert batch.images.dtype == torch.float16 and np.array_equal(batch.images.numpy(), stored[batch.sample_ids])


def test_stream_leaves_the_global_generator_alone(dataset: ShardedDataset):
    before = torch.get_rng_state()
    with open_stream(dataset) as batches:
        next(batches)
    assert torch.equal(torch.get_rng_state(), before)


def damaged(digits: Path, tmp_path: Path) -> ShardedDataset:
    """The digits with every training shard overwritten after the first 100 KiB."""
    copy = shutil.copytree(digits, tmp_path / "damaged")
    for shard in copy.glob("train-*.tar"):
        content = shard.read_bytes()
        shard.write_bytes(content[:102_400] + bytes(len(content) - 102_400))
    return open_dataset(str(copy), "train")


def test_error_in_the_thread_reaches_the_consumer(digits: Path, tmp_path: Path):
    with open_stream(damaged(digits, tmp_path)) as batches:
        with pytest.raises(
            DataError, match=r"train-00000\d\.tar: sample 'digit-\d+' is damaged .*sctrain prepare"
        ) as caught:
            list(islice(batches, 20))
    assert "\n" not in str(caught.value)


def test_workers_end_report_and_outlive_signals(dataset: ShardedDataset, digits: Path, tmp_path: Path):
    """One process start serves two questions, since starting one takes seconds."""
    before = torch.get_rng_state()
    with open_stream(dataset, workers=1) as batches:
        next(batches)
        (worker,) = multiprocessing.active_children()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(worker.pid, number)
        assert len(list(islice(batches, 10))) == 10
    assert not worker.is_alive() and multiprocessing.active_children() == []
    assert torch.equal(torch.get_rng_state(), before)
    with open_stream(damaged(digits, tmp_path), workers=1) as batches:
        with pytest.raises(DataError, match=r"is damaged") as caught:
            list(islice(batches, 20))
    assert "\n" not in str(caught.value)  # not torch's report of a worker's traceback
    assert multiprocessing.active_children() == []


UNCLOSED = """
import sys
from data_pipeline.loader import open_dataset, stream

if __name__ == "__main__":
    dataset = open_dataset(sys.argv[1], "train")
    options = dict(seed=0, start=0, global_batch=8, micro_batch=8, rank=0, world=1, workers=1, prefetch=2, window=100)
    batches = stream(dataset, **options)
    next(batches)
    raise RuntimeError("the consumer failed")
"""


@pytest.mark.full
def test_a_consumer_that_fails_without_closing_still_exits(digits: Path, tmp_path: Path):
    (tmp_path / "consumer.py").write_text(UNCLOSED)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(tmp_path / "consumer.py"), str(digits)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)
    assert ended.returncode == 1 and ended.stderr.endswith("RuntimeError: the consumer failed\n")


def test_close_ends_the_thread_and_reads_no_further(dataset: ShardedDataset):
    def readers() -> list[threading.Thread]:  # others' threads may come and go meanwhile
        return [thread for thread in threading.enumerate() if thread.name.startswith("data")]

    assert not readers()
    batches = open_stream(dataset)
    next(batches)
    assert len(readers()) == 1
    batches.close()
    assert not readers()
    with pytest.raises(StopIteration):
        next(batches)


def test_prefetch_is_bounded_and_waiting_is_counted(dataset: ShardedDataset, monkeypatch: pytest.MonkeyPatch):
    reads = []
    decode = ShardedDataset.decode

    def slow_decode(self: ShardedDataset, sample_ids: np.ndarray, *rest: Any):
        reads.append(len(sample_ids))
        time.sleep(0.02)
        return decode(self, sample_ids, *rest)

    monkeypatch.setattr(ShardedDataset, "decode", slow_decode)
    with open_stream(dataset) as batches:
        next(batches)
        waited = batches.wait_seconds
        assert waited >= 0.02
        time.sleep(0.3)  # long enough for everything that may be read ahead
        assert len(reads) == 3
        next(batches)
        assert batches.wait_seconds - waited < 0.02
