"""Preparing CIFAR-10 from its own archives, and archives that mean harm."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from archives import cifar10_batches, cifar10_binary, cifar10_python, python2_pickle, read_split, tar_bytes

from data_pipeline.errors import DataError
from data_pipeline.sources.cifar10 import CLASSES, prepare_cifar10
from data_pipeline.sources.plain_pickle import NotPlainError, read_plain


@pytest.mark.parametrize("make", [cifar10_python, cifar10_binary])
def test_both_versions_keep_every_pixel(make, tmp_path: Path):
    description = prepare_cifar10(make(tmp_path / "cifar-10.tar.gz"), tmp_path / "out")
    assert description.classes == CLASSES and description.shape == (3, 32, 32)
    batches = cifar10_batches()
    for split, names in (("train", [f"data_batch_{n}" for n in range(1, 6)]), ("test", ["test_batch"])):
        truth = np.concatenate([batches[name][0] for name in names]).reshape(-1, 3, 32, 32)
        true_labels = [label for name in names for label in batches[name][1]]
        images, labels, keys = read_split(tmp_path / "out", split)
        numbers = [int(key.removeprefix(f"{split}-")) for key in keys]
        assert sorted(numbers) == list(range(len(truth)))
        assert np.array_equal(images.numpy(), truth[numbers])
        assert labels == [true_labels[number] for number in numbers]


def test_both_versions_give_the_same_shards(tmp_path: Path):
    prepare_cifar10(cifar10_python(tmp_path / "p.tar.gz"), tmp_path / "a")
    prepare_cifar10(cifar10_binary(tmp_path / "b.tar.gz"), tmp_path / "b")
    for name in ("train-000000.tar", "test-000000.tar", "index-train.npz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_one_class_for_all(tmp_path: Path):
    description = prepare_cifar10(cifar10_binary(tmp_path / "b.tar.gz"), tmp_path / "out", one_class=True)
    assert len(description.classes) == 1 and set(read_split(tmp_path / "out", "train")[1]) == {0}


class _Harm:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_hostile_pickles_run_nothing(tmp_path: Path):
    trace = tmp_path / "trace"
    hostile = {
        "call": pickle.dumps(_Harm(trace), protocol=2),
        "inside": python2_pickle({b"data": _Harm(trace), b"labels": [0]}),
        "builtins": b"cbuiltins\nexec\n(S'import os; os.mkdir(" + repr(str(trace)).encode() + b")'\ntR.",
        "getattr": b"cnumpy\nload\n(S'x'\ntR.",
        "dotted": b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__new__\x93.",
        "persistent": b"Pabc\n.",
    }
    for name, data in hostile.items():
        archive = cifar10_python(tmp_path / f"{name}.tar.gz", {"data_batch_3": data})
        with pytest.raises(
            DataError, match=r"data_batch_3 is not what CIFAR-10 holds .*: give cifar-10-python\.tar\.gz"
        ):
            prepare_cifar10(archive, tmp_path / "out")
    assert not trace.exists() and not (tmp_path / "out").exists()
    pickle.loads(hostile["call"])  # the same bytes do harm where they are trusted
    assert trace.exists()


def test_mutated_pickles_never_surprise():
    images = np.arange(60, dtype=np.uint8).reshape(5, 12)
    good = python2_pickle({b"data": images, b"labels": [1, 2, 3, 4, 5]})
    assert np.array_equal(read_plain(good)[b"data"], images)
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(2000):
        data = bytearray(good)
        for place in generator.integers(0, len(data), generator.integers(1, 4)):
            data[place] = generator.integers(0, 256)
        try:
            read_plain(bytes(data))
        except NotPlainError:
            refused += 1
    assert refused > 500


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data_batch_2": python2_pickle([1, 2])}, "data_batch_2 .*it is not a dictionary"),
        ({"data_batch_2": b""}, "it is no pickle"),
        ({"data_batch_2": python2_pickle({b"labels": [1]})}, "data_batch_2 is not what CIFAR-10 holds"),
        ({"data_batch_2": python2_pickle({b"data": np.zeros((1, 3072)), b"labels": [1]})}, "array is not of bytes"),
        (
            {"data_batch_2": python2_pickle({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1, 2]})},
            "arrays have another form",
        ),
        (
            {"data_batch_2": python2_pickle({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]})},
            "labels beyond the 10 classes",
        ),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, changed: dict[str, bytes], message: str):
    with pytest.raises(DataError, match=message):
        prepare_cifar10(cifar10_python(tmp_path / "c.tar.gz", changed), tmp_path / "out")


def test_other_archives_are_refused(tmp_path: Path):
    path = tmp_path / "cifar-100-python.tar.gz"
    path.write_bytes(tar_bytes({"cifar-100-python/train": b""}, "w:gz"))
    with pytest.raises(DataError, match=r"holds no data_batch_1: give cifar-10-python\.tar\.gz"):
        prepare_cifar10(path, tmp_path / "out")
    whole = cifar10_binary(path).read_bytes()
    for cut in (len(whole) // 2, len(whole) - 10, 20):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"cifar-100-python\.tar\.gz cannot be read"):
            prepare_cifar10(path, tmp_path / "out")
    with pytest.raises(DataError, match="nowhere cannot be read"):
        prepare_cifar10(tmp_path / "nowhere", tmp_path / "out")
