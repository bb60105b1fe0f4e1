"""The index: a round trip, and every claim it must not make."""

import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.dataset import open_dataset
from data_pipeline.description import DESCRIPTION_FILE, SplitDescription, read_description
from data_pipeline.errors import DataError
from data_pipeline.generated import write_latents
from data_pipeline.index import ShardIndex, load_index
from data_pipeline.order import SampleOrder
from data_pipeline.reader import LookAhead, Reader, ReadOptions


def make_index(samples: int, shards: int) -> ShardIndex:
    """Samples of 1,024 bytes, spread evenly."""
    shard = np.sort(np.arange(samples) % shards).astype("<i4")
    counts = np.bincount(shard, minlength=shards)
    first = np.cumsum(counts) - counts
    return ShardIndex(
        shard_names=np.array([b"train-%06d.tar" % number for number in range(shards)]),
        shard_bytes=(counts * 1024 + 1024).astype("<i8"),
        key=np.char.mod("%08d", np.arange(samples)).astype("S8"),
        shard=shard,
        offset=((np.arange(samples) - first[shard]) * 1024).astype("<i8"),
        size=np.full(samples, 1024, "<i4"),
        label=(np.arange(samples) % 10).astype("<i4"),
        crc32=np.arange(samples).astype("<u4"),
    )


def saved(index: ShardIndex, folder: Path) -> str:
    path = folder / "index-train.npz"
    with path.open("wb") as file:
        index.save(file)
    return str(path)


def test_round_trip_of_many_rows(tmp_path: Path):
    index = make_index(200_000, 300)
    loaded = load_index(saved(index, tmp_path))
    assert len(loaded) == 200_000
    assert loaded.fingerprint == index.fingerprint
    assert loaded.shard_counts.tolist() == np.bincount(index.shard).tolist()
    assert loaded.shard_name(199_999) == "train-000299.tar"


def test_an_index_of_imagenets_size(tmp_path: Path):
    """1,281,167 samples in 1,043 shards: what it costs to open it, and to know an epoch's order."""
    url = saved(make_index(1_281_167, 1_043), tmp_path)
    tracemalloc.start()
    start = time.process_time()
    index = load_index(url)
    assert len(index.fingerprint) == 64
    loaded = time.process_time()
    ids = SampleOrder(index, 0, 65_536).sample_ids(np.arange(256))
    ordered, (_, peak) = time.process_time(), tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loaded - start < 2 and ordered - loaded < 2
    assert peak < 300 * 10**6
    assert len(np.unique(np.searchsorted(index.span_starts, ids, side="right"))) < 100  # of 20,000


def test_the_first_batch_of_a_set_of_imagenets_size(tmp_path: Path):
    """Opened, its shards compared with their recorded sizes, ordered, and the bytes of 256 samples there."""
    write_latents(str(tmp_path), 8, 1)
    about, index = read_description(str(tmp_path)), make_index(1_281_167, 1_001)
    split = SplitDescription(samples=len(index), index="index-train.npz", fingerprint=index.fingerprint)
    about = about.model_copy(update={"splits": {"train": split}})
    (tmp_path / DESCRIPTION_FILE).write_text(about.model_dump_json())
    saved(index, tmp_path)
    for name, size in zip(index.shard_names.tolist(), index.shard_bytes.tolist(), strict=True):
        with (tmp_path / name.decode()).open("wb") as file:
            file.truncate(size)  # a file of holes
    start = time.process_time()
    dataset = open_dataset(str(tmp_path), "train")
    reader = Reader(dataset, 0, 65_536, ReadOptions(), LookAhead(0, 0), spans=False)
    ids, samples = reader.fetch(np.arange(256))
    assert time.process_time() - start < 5
    assert len(set(ids.tolist())) == 256 and samples == [bytes(1024)] * 256


def test_spans_cut_shards_into_some_mebibytes():
    index = make_index(20_000, 3)  # 6.5 MiB each
    starts = index.span_starts
    assert starts.tolist() == [0, 4096, 6667, 6667 + 4096, 13_334, 13_334 + 4096, 20_000]
    assert index.span_counts.sum() == 20_000
    large = replace(
        index, size=np.full(20_000, 1024, "<i4"), offset=index.offset * 8192, shard_bytes=index.shard_bytes * 8192
    )
    assert large.span_counts.tolist() == [1] * 20_000  # a sample larger than a span is one


@pytest.mark.parametrize("column", ["shard_names", "shard_bytes", "key", "offset", "size", "label", "crc32"])
def test_fingerprint_covers_every_column(column: str):
    index = make_index(20, 2)
    changed = getattr(index, column).copy()
    changed[1] = b"other" if changed.dtype.kind == "S" else changed[1] + 1
    assert replace(index, **{column: changed}).fingerprint != index.fingerprint


def changed(column: str, row: int, value: object) -> ShardIndex:
    index = make_index(20, 2)
    values = getattr(index, column).copy()
    values[row] = value
    return replace(index, **{column: values})


HOSTILE = {
    "path out of the folder": changed("shard_names", 0, b"../escape.tar"),
    "absolute path": changed("shard_names", 0, b"/etc/passwd"),
    "hidden file": changed("shard_names", 0, b".train.tar"),
    "empty name": changed("shard_names", 0, b""),
    "newline in a name": changed("shard_names", 0, b"a\nb.tar"),
    "not ASCII": changed("shard_names", 0, b"\xff.tar"),
    "name twice": changed("shard_names", 0, b"train-000001.tar"),
    "negative shard": changed("shard", 0, -1),
    "shard not listed": changed("shard", 19, 2),
    "shards out of order": changed("shard", 0, 1),
    "negative offset": changed("offset", 0, -1024),
    "offset beyond the shard": changed("offset", 9, 2**62),
    "size zero": changed("size", 0, 0),
    "size beyond the shard": changed("size", 19, 2**30),
    "odd offset": changed("offset", 3, 3 * 1024 + 1),
    "overlap": changed("size", 3, 2048),
    "negative label": changed("label", 0, -1),
    "no samples": make_index(0, 1),
    "columns of two lengths": replace(make_index(20, 2), label=np.zeros(19, "<i4")),
    "wrong type": replace(make_index(20, 2), label=np.zeros(20, "<f4")),
    "two dimensions": replace(make_index(20, 2), label=np.zeros((20, 1), "<i4")),
}


@pytest.mark.parametrize("index", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_index_is_refused(index: ShardIndex, tmp_path: Path):
    with pytest.raises(DataError, match=r"index-train\.npz is not a valid index .*sctrain prepare") as caught:
        load_index(saved(index, tmp_path))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_index_are_refused(tmp_path: Path):
    complete = Path(saved(make_index(20, 2), tmp_path)).read_bytes()
    np.savez(tmp_path / "pickled.npz", shard_names=np.array([{}], dtype=object))
    np.savez(tmp_path / "other.npz", something=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "short.npz").write_bytes(complete[:-100])
    (tmp_path / "flipped.npz").write_bytes(complete[:600] + bytes([complete[600] ^ 1]) + complete[601:])
    (tmp_path / "empty.npz").touch()
    for name in ("pickled.npz", "other.npz", "array.npy", "short.npz", "flipped.npz", "empty.npz"):
        with pytest.raises(DataError, match=f"{name} is not a readable index"):
            load_index(str(tmp_path / name))
    with pytest.raises(DataError, match=r"missing\.npz does not exist"):
        load_index(str(tmp_path / "missing.npz"))
