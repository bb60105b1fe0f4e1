"""Preparing the digits: content, reproducibility, and what happens to a folder that is already there."""

import fcntl
import gc
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from sklearn.datasets import load_digits

from data_pipeline.description import read_description
from data_pipeline.digits import prepare_digits
from data_pipeline.errors import DataError
from data_pipeline.loader import open_dataset
from data_pipeline.split import stratified_split


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare_digits(folder)
    return folder


def read_all(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Images, labels and scikit-learn's numbers of a whole split."""
    dataset = open_dataset(str(folder), split)
    images, labels = dataset.read(np.arange(len(dataset)))
    return images, labels, [int(key.decode().removeprefix("digit-")) for key in dataset.index.key]


def test_splits_hold_every_digit_once(digits: Path):
    truth = load_digits()
    numbers = []
    for split in ("train", "test"):
        images, labels, here = read_all(digits, split)
        assert images.dtype == torch.uint8 and images.shape[1:] == (1, 8, 8) and labels.dtype == torch.int64
        assert np.array_equal(images[:, 0].numpy(), np.round(truth.images[here] * 255 / 16))
        assert np.array_equal(labels.numpy(), truth.target[here])
        numbers += here
    assert sorted(numbers) == list(range(1797))


def test_test_split_is_a_stratified_fifth(digits: Path):
    labels = read_all(digits, "test")[1]
    expected = [round(0.2 * count) for count in np.bincount(load_digits().target)]
    assert torch.bincount(labels).tolist() == expected


def test_samples_are_shuffled_across_classes(digits: Path):
    labels, numbers = read_all(digits, "train")[1:]
    assert all(len(set(shard.tolist())) == 10 for shard in labels.split(256))
    assert numbers != sorted(numbers)


def test_description_matches_the_training_pixels(digits: Path):
    description = read_description(str(digits))
    pixels = read_all(digits, "train")[0].double() / 255
    assert description.mean == pytest.approx([pixels.mean().item()], abs=1e-12)
    assert description.std == pytest.approx([pixels.std(correction=0).item()], abs=1e-12)
    assert description.shape == (1, 8, 8) and description.classes == list("0123456789")
    assert description.splits["train"].samples + description.splits["test"].samples == 1797
    assert "CC BY 4.0" in description.licence


def test_preparing_twice_gives_the_same_bytes(digits: Path, tmp_path: Path):
    prepare_digits(tmp_path / "again")
    names = sorted(path.name for path in digits.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert len([name for name in names if name.endswith(".tar")]) == 8
    for name in names:
        assert (digits / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its shards to the collector
def test_plain_webdataset_reads_the_shards(digits: Path):
    dataset = open_dataset(str(digits), "train")
    shards = [str(digits / name.decode()) for name in dataset.index.shard_names]
    images, labels = dataset.read(np.arange(len(dataset)))
    samples = list(wds.WebDataset(shards, shardshuffle=False).decode("l8").to_tuple("__key__", "png", "cls"))
    gc.collect()
    assert [key.encode() for key, _, _ in samples] == dataset.index.key.tolist()
    assert [label for _, _, label in samples] == labels.tolist()
    assert np.array_equal(np.stack([image for _, image, _ in samples]), images[:, 0].numpy())


def test_repeating_verifies_and_changes_nothing(digits: Path, caplog: pytest.LogCaptureFixture):
    before = {path: path.stat().st_mtime_ns for path in digits.iterdir()}
    with caplog.at_level("INFO", logger="data_pipeline"):
        assert prepare_digits(digits) == read_description(str(digits))
    assert f"{digits} is complete" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in digits.iterdir()}


def test_repeating_notices_damage(digits: Path, tmp_path: Path):
    copy = shutil.copytree(digits, tmp_path / "copy")
    os.truncate(copy / "test-000001.tar", 512)
    with pytest.raises(DataError, match=r"test-000001\.tar holds 512 bytes where .* delete .* `sctrain prepare` again"):
        prepare_digits(copy)


def test_other_folders_are_never_overwritten(digits: Path, tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    with pytest.raises(DataError, match="thesis exists and is not a data set: choose another folder"):
        prepare_digits(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "precious"
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file exists and is not a data set"):
        prepare_digits(tmp_path / "file")
    other = shutil.copytree(digits, tmp_path / "other")
    content = json.loads((other / "dataset.json").read_text())
    content["recipe"]["test_share"] = 0.5
    (other / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"holds another data set \(test_share 0\.5 instead of 0\.2\)"):
        prepare_digits(other)


def test_failed_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(DataError, match=r"digits.* cannot be written \(No space left on device\): "):
            prepare_digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_writer_are_removed(digits: Path, tmp_path: Path):
    (tmp_path / "digits").mkdir()  # an empty folder is no obstacle
    (tmp_path / ".digits.partial" / "data").mkdir(parents=True)
    (tmp_path / ".digits.partial" / "data" / "train-000000.tar").touch()
    (tmp_path / ".digits.partial" / "data" / "train-000001.tar.part").touch()
    prepare_digits(tmp_path / "digits")
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    assert sorted(path.name for path in (tmp_path / "digits").iterdir()) == sorted(p.name for p in digits.iterdir())


def test_two_writers_do_not_meet(tmp_path: Path):
    partial = tmp_path / ".digits.partial"
    partial.mkdir()
    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="digits is being written by another process: wait for it"):
        prepare_digits(tmp_path / "digits")
    os.close(lock)
    prepare_digits(tmp_path / "digits")
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_split_keeps_sides_and_both_sides_filled():
    names = [f"image-{number}" for number in range(40)]
    labels = [0] * 38 + [1] * 2
    parts = stratified_split(names, labels, 0.1)
    assert sorted(parts["train"] + parts["test"]) == list(range(40))
    assert len(parts["test"]) == 4 + 1 and len({38, 39} & set(parts["test"])) == 1
    fewer = stratified_split(names[1:38], labels[1:38], 0.1)
    kept = {p + 1 for p in fewer["test"]} & set(parts["test"])
    assert len(kept) >= 3
