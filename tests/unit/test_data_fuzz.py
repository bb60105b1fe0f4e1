"""10,000 mutated inputs: each is refused in one sentence or read as it is, at once and in little memory.

Nothing that an archive, an index or a description says leads out of the folder that is read or written.
"""

import io
import json
import pickle
import random
import resource
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial as bound
from pathlib import Path

import numpy as np
import pytest
from archives import coloured, tar_bytes
from mutations import mutated, mutated_json

from data_pipeline.dataset import open_dataset
from data_pipeline.decode import BadSampleError, decode_sample, encode_npy, encode_png
from data_pipeline.description import is_plain_name, read_description
from data_pipeline.encoding import Output
from data_pipeline.errors import DataError
from data_pipeline.index import ShardIndex, load_index
from data_pipeline.records import load_finished
from data_pipeline.sources.plain_pickle import NotPlainError, read_plain
from data_pipeline.sources.shards import prepare_shards
from data_pipeline.storage import delete
from data_pipeline.targets import open_target
from data_pipeline.tars import scan, scan_file

LONGEST_S = 3.0  # of the processor, for one input; the usual takes a millisecond
MOST_BYTES = 300 * 2**20  # of memory, over all of one kind
FULL = pytest.mark.full


def attempt(work: Callable[[], object]) -> bool:
    """Whether the work was refused; how it is refused, and how long it takes, is checked here."""
    start = time.process_time()
    try:
        work()
        refused = False
    except DataError as error:
        refused = True
        text = str(error)
        assert "\n" not in text and text.endswith(".") and len(text) < 40_000, text
    assert time.process_time() - start < LONGEST_S
    return refused


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES


def counts(count: int):
    """The usual number of inputs, and five times as many others in the full suite."""
    return pytest.mark.parametrize(
        ("count", "seed"), [pytest.param(count, 0, id="usual"), pytest.param(5 * count, 1, id="many", marks=FULL)]
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 24 images in three shards."""
    folder = tmp_path_factory.mktemp("data") / "images"
    source = tmp_path_factory.mktemp("source") / "a.tar"
    members = {}
    for number in range(24):
        members |= {f"s{number:02d}.png": coloured(number % 3, 8, 8, "PNG"), f"s{number:02d}.cls": b"%d" % (number % 3)}
    source.write_bytes(tar_bytes(members))
    prepare_shards(str(source), str(folder), 8, output=Output(samples_per_shard=8))
    return folder


def samples() -> list[tuple[bytes, tuple[int, int, int], str | None]]:
    """Byte ranges of shards: every format there is, with shape and type of latents."""
    label = {"k.cls": b"7"}
    pixels = np.arange(64, dtype=np.uint8).reshape(1, 8, 8)
    tars: list[tuple[bytes, tuple[int, int, int], str | None]] = [
        (tar_bytes({f"k.{suffix}": coloured(1, 8, 8, kind)} | label), (3, 8, 8), None)
        for suffix, kind in (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"))
    ]
    tars.append((tar_bytes({"k.png": encode_png(pixels)} | label), (1, 8, 8), None))
    tars.append((tar_bytes({"k.npy": encode_npy(np.zeros((4, 8, 8), np.float16))} | label), (4, 8, 8), "float16"))
    return [(data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512), *rest) for data, *rest in tars]  # type: ignore


@counts(4900)
def test_samples(count: int, seed: int):
    choose, sound = random.Random(seed), samples()
    refused = 0
    for number in range(count):
        data, shape, latent = sound[number % len(sound)]
        data = mutated(data, choose)
        start = time.process_time()
        try:
            _, array, label = decode_sample(data, zlib.crc32(data), shape, latent)
            assert array.shape == shape and array.dtype == (latent or "uint8") and 0 <= label < 10**9
        except BadSampleError as error:
            assert "\n" not in str(error)
            refused += 1
        assert time.process_time() - start < LONGEST_S
    assert 0.3 * count < refused < count


def refilled(index: ShardIndex, choose: random.Random) -> bytes:
    """An archive that is whole, of columns that are not."""
    columns = {field.name: getattr(index, field.name).copy() for field in fields(index)}
    name = choose.choice(list(columns))
    column = columns[name]
    kind = choose.randrange(5)
    if kind == 0 and column.dtype.kind != "S":
        bounds = np.iinfo(column.dtype)
        extreme = [bounds.min, bounds.max, 0, 1, 511, 512, bounds.max - 511]
        column[choose.randrange(len(column))] = choose.choice(extreme)
    elif kind == 0:
        text = choose.choice([b"..", b"../x", b"a/b", b"", b"\xff", b".x", b"a\\b", b"x" * 300, b"a\x00b", b"a\nb"])
        columns[name] = np.array([text, *column[1:].tolist()])
    elif kind == 1:
        columns[name] = column[: choose.randrange(len(column))]
    elif kind == 2:
        types = ["<U9"] if column.dtype.kind == "S" else ["<f8", "<i2", ">i4", "<u8", "<U8", "|b1"]
        columns[name] = column.astype(choose.choice(types))
    elif kind == 3:
        columns[name] = choose.choice([column[None], column[::-1], np.zeros(0), np.array(3), np.repeat(column, 2)])
    else:
        del columns[name]
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **columns)
    return file.getvalue()


def repacked(sound: bytes, choose: random.Random) -> bytes:
    """An archive that is whole, of arrays whose files are not."""
    file, kept = io.BytesIO(), zipfile.ZipFile(io.BytesIO(sound))
    damaged = choose.choice(kept.namelist())
    with zipfile.ZipFile(file, "w") as archive:
        for name in kept.namelist():
            archive.writestr(name, mutated(kept.read(name), choose) if name == damaged else kept.read(name))
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Reading `.npy` or `.npz` file required additional header parsing")
@counts(1300)
def test_indices(original: Path, tmp_path: Path, count: int, seed: int):
    choose, path = random.Random(seed), tmp_path / "index.npz"
    sound, index = (original / "index-train.npz").read_bytes(), load_index(str(original / "index-train.npz"))
    refused = 0

    def read() -> None:
        found = load_index(str(path))
        assert all(is_plain_name(name.decode()) for name in found.shard_names.tolist())
        ends = found.offset + found.size
        assert (
            (found.offset >= 0).all()
            and (ends <= found.shard_bytes[found.shard]).all()
            and len(found.fingerprint) == 64
        )

    for number in range(count):
        kinds = mutated(sound, choose), refilled(index, choose), repacked(sound, choose)
        path.write_bytes(kinds[number % 3])
        refused += attempt(read)
    assert 0.5 * count < refused < count


@counts(1400)
def test_descriptions(original: Path, tmp_path: Path, count: int, seed: int):
    choose, sound = random.Random(seed), (original / "dataset.json").read_bytes()
    refused = 0
    for _ in range(count):
        (tmp_path / "dataset.json").write_bytes(mutated_json(sound, choose))
        refused += attempt(lambda: read_description(str(tmp_path)).shape)
    assert 0.5 * count < refused < count


@counts(1200)
def test_archives(tmp_path: Path, count: int, seed: int):
    choose, path = random.Random(seed), tmp_path / "a.tar"
    long = "folder/" * 30 + "x.png"
    sound = [tar_bytes({"a.png": bytes(700), "a.cls": b"3", long: b"x"}), tar_bytes({"in.tar": tar_bytes({"b": b"c"})})]
    refused = 0

    def read(data: bytes) -> None:
        for member in scan(path):
            assert 0 <= member.offset <= member.offset + member.size <= len(data)
            if member.name == "in.tar":
                list(scan(path, member))

    def stream(data: bytes) -> None:
        list(scan_file(io.BytesIO(data), "a.tar", seekable=False))

    for number in range(count):
        data = mutated(sound[number % 2], choose)
        path.write_bytes(data)
        refused += attempt(bound(read, data))
        attempt(bound(stream, data))
    assert 0.3 * count < refused < count


@counts(400)
def test_whole_data_sets(original: Path, tmp_path: Path, count: int, seed: int):
    """One file of a data set is damaged: refused, or the very samples that were written."""
    folder, choose = shutil.copytree(original, tmp_path / "data"), random.Random(seed)
    dataset = open_dataset(str(original), "train")
    images, labels = dataset.read(np.arange(len(dataset)))
    refused = 0

    def read() -> None:
        found = open_dataset(str(folder), "train")
        seen, of = found.read(np.arange(len(found)))
        assert (seen == images).all() and (of == labels).all()

    for name in (names := sorted(path.name for path in original.iterdir())) * (count // len(names)):
        sound = (folder / name).read_bytes()
        delete([str(folder / name)])  # which forgets the open file too
        (folder / name).write_bytes((mutated_json if name.endswith(".json") else mutated)(sound, choose))
        refused += attempt(read)
        delete([str(folder / name)])
        (folder / name).write_bytes(sound)
    assert 0.5 * count < refused < 0.98 * count
    assert not attempt(read)


@counts(200)
def test_records_of_unfinished_work(tmp_path: Path, count: int, seed: int):
    """What an interrupted preparation left is gone on with, refused or written again."""
    choose, plan = random.Random(seed), {"name": "x", "resolution": 8, "quality": 0.5}
    partial = tmp_path / ".data.partial"
    record = {"crc32": 1, "end": 8, "sums": [1], "squares": [1], "skipped": [], "enlarged": 0, "fingerprint": "0" * 64}
    for _ in range(count):
        partial.mkdir(exist_ok=True)
        (partial / "records").mkdir(exist_ok=True)
        (partial / "plan.json").write_bytes(mutated_json(json.dumps(plan).encode(), choose))
        (partial / "records" / "train-000000.tar.json").write_bytes(mutated_json(json.dumps(record).encode(), choose))
        (partial / "records" / "train-000000.tar.npz").write_bytes(choose.randbytes(100))

        def go_on() -> None:
            with open_target(str(tmp_path / "data"), plan) as target:
                assert target.finished("train-000000.tar") is None

        attempt(go_on)
        assert load_finished(str(partial / "records"), "train-000000.tar") is None
        assert {path.name for path in tmp_path.iterdir()} <= {".data.partial", "data"}


@counts(500)
def test_pickles(count: int, seed: int):
    choose = random.Random(seed)
    sound = pickle.dumps({b"data": np.zeros((4, 12), np.uint8), b"labels": [1, 2, 3, 4]}, protocol=2)
    for _ in range(count):
        start = time.process_time()
        try:
            assert isinstance(read_plain(mutated(sound, choose)), dict)
        except NotPlainError as error:
            assert "\n" not in str(error)
        assert time.process_time() - start < LONGEST_S


@counts(100)
def test_sources_of_shards_write_nowhere_else(tmp_path: Path, count: int, seed: int):
    """Names that climb, labels of every kind, and damaged archives, through a whole preparation."""
    choose = random.Random(seed)
    names = ("../../x", "/tmp/x", "a/../../b", "x", "..", "a\nb", "C:\\x", "-rf", "é", " ", "x" * 90)
    done = 0
    for number in range(count):
        root = tmp_path / str(number)
        (root / "in").mkdir(parents=True)
        members = {}
        for sample in range(4):
            key = f"{choose.choice(names)}{sample}"
            label = b'{"label": 2, "x": [1]}'
            label = label if sample else mutated_json(label, choose)
            members |= {f"{key}.png": coloured(1, 8, 8, "PNG"), f"{key}.json": label}
        data = tar_bytes(members)
        (root / "in" / "a.tar").write_bytes(data if number % 2 else mutated(data, choose))
        done += not attempt(bound(prepare_shards, str(root / "in" / "a.tar"), str(root / "out"), 8))
        assert {path.name for path in root.iterdir()} <= {"in", "out"}
        if (root / "out").exists():
            assert {path.name for path in (root / "out").iterdir()} == {
                "dataset.json",
                "index-train.npz",
                "train-000000.tar",
            }
            dataset = open_dataset(str(root / "out"), "train")
            dataset.read(np.arange(len(dataset)))
    assert 0 < done < count
