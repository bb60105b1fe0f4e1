"""Preparing LSUN from its databases, in miniature."""

import os
import sys
from pathlib import Path

import lmdb
import pytest
from archives import colour_classes, coloured, read_split

from data_pipeline.errors import DataError
from data_pipeline.shards import Job
from data_pipeline.sources import lmdb_reader
from data_pipeline.sources.lsun import prepare_lsun


def database(path: Path, label: int, count: int = 5) -> Path:
    """Values are webp and keys hashes, as in LSUN's."""
    with lmdb.open(str(path), map_size=2**20) as environment, environment.begin(write=True) as transaction:
        for number in range(count):
            key = f"{(label * 7919 + number * 104729) % 2**32:040x}".encode()
            transaction.put(key, coloured(label, 24 + number, image_format="WEBP"))
    return path


def test_categories_become_classes(tmp_path: Path):
    cat = database(tmp_path / "cat_train_lmdb", 1)
    bedroom = database(tmp_path / "bedroom_train_lmdb", 0)
    val = [database(tmp_path / f"{name}_val_lmdb", label, 2) for label, name in enumerate(("bedroom", "cat"))]
    description = prepare_lsun([cat, bedroom], tmp_path / "out", 16, val=val, job=Job(processes=2))
    assert description.classes == ["bedroom", "cat"] and description.name == "lsun-bedroom-cat16"
    for split, count in (("train", 10), ("test", 4)):
        images, labels, keys = read_split(tmp_path / "out", split)
        assert colour_classes(images) == labels and len(labels) == count and len(set(keys)) == count
        assert all(len(key) == 40 for key in keys)


def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cat = database(tmp_path / "cat_train_lmdb", 1)
    other = database(tmp_path / "dog_val_lmdb", 1)
    empty = database(tmp_path / "empty_lmdb", 0, count=0)
    damaged = tmp_path / "damaged_lmdb"
    damaged.mkdir()
    (damaged / "data.mdb").write_bytes(os.urandom(8192))
    out = tmp_path / "out"
    for sources, options, message in [
        ([tmp_path], {}, r"is no LMDB: give the folder that holds data\.mdb"),
        ([empty], {}, "empty_lmdb is empty"),
        ([damaged], {}, "damaged_lmdb is damaged or no LMDB"),
        ([cat, cat], {}, "is given twice"),
        ([cat], {"val": [other]}, "--val has the categories dog, not cat"),
    ]:
        with pytest.raises(DataError, match=message):
            prepare_lsun(sources, out, 16, **options)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    lmdb_reader._environment.cache_clear()
    with pytest.raises(DataError, match=r"reading LSUN needs the package lmdb: `pip install 'sctrain\[lsun\]'`"):
        prepare_lsun([cat], out, 16)
