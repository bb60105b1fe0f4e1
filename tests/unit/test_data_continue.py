"""Preparations by several processes, interrupted ones, and those that write to a bucket: always the same bytes."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from preparing import Interrupt, content, stopping_after, write_photos

from data_pipeline import publish, targets
from data_pipeline.description import read_description
from data_pipeline.encoding import Output
from data_pipeline.errors import DataError
from data_pipeline.shards import Bar, Job, quiet
from data_pipeline.sources.folder import prepare_folder

OUTPUT = Output(samples_per_shard=8)
PROGRAM = Path(__file__).parent / "programs" / "prepare_slowly.py"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 images of noise in two classes."""
    return write_photos(tmp_path_factory.mktemp("source") / "photos", 100, (12, 10))


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed preparation in one process writes."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    prepare_folder(photos, folder, 8, output=OUTPUT)
    return content(folder)


def test_any_number_of_processes_writes_the_same(photos: Path, whole: dict[str, bytes], tmp_path: Path):
    prepare_folder(photos, tmp_path / "out", 8, output=OUTPUT, job=Job(processes=3))
    assert content(tmp_path / "out") == whole and len(whole) == 12 + 2 + 3  # shards, indices and dataset.json


def test_killed_and_repeated_gives_the_same_bytes(photos: Path, whole: dict[str, bytes], tmp_path: Path):
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    process = subprocess.Popen([sys.executable, PROGRAM, photos, out, "2"])
    deadline = time.monotonic() + 60
    while not (partial / "records" / "train-000002.tar.json").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert workers and not psutil.wait_procs(workers, timeout=20)[1], "workers outlive their parent"
    assert not out.exists()
    kept = {path.name: path.stat().st_mtime_ns for path in (partial / "data").glob("*.tar")}
    damaged = partial / "data" / "train-000002.tar"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    seen = []

    def progress(split: str, total: int, done: int) -> Bar:
        seen.append((split, done))
        return quiet(split, total, done)

    prepare_folder(photos, out, 8, output=OUTPUT, job=Job(progress=progress))
    assert content(out) == whole
    assert seen == [("train", 16), ("test", 0)]  # what is damaged is written again
    for name in ("train-000000.tar", "train-000001.tar"):
        assert (out / name).stat().st_mtime_ns == kept[name]
    assert not partial.exists()


def test_unfinished_work_is_never_thrown_away_for_another_command(photos: Path, tmp_path: Path):
    with pytest.raises(Interrupt):
        prepare_folder(photos, tmp_path / "out", 8, output=OUTPUT, job=stopping_after(20))
    before = content(tmp_path / ".out.partial" / "data")
    with pytest.raises(DataError, match=r"unfinished work of another command \(.*resolution 8 instead of 9.*delete"):
        prepare_folder(photos, tmp_path / "out", 9, output=OUTPUT)
    assert content(tmp_path / ".out.partial" / "data") == before and "train-000001.tar" in before


def test_broken_images_can_be_skipped_half_way(photos: Path, tmp_path: Path):
    """The same shards whether the flag was there from the beginning or only after the first mistake."""
    source = tmp_path / "source"
    for path in photos.rglob("*.png"):
        target = source / path.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes() if int(path.stem) % 40 else b"broken")
    with pytest.raises(DataError, match="is not a readable image"):
        prepare_folder(source, tmp_path / "a", 8, output=OUTPUT)
    skip = Job(skip_broken=True)
    prepare_folder(source, tmp_path / "a", 8, output=OUTPUT, job=skip)
    prepare_folder(source, tmp_path / "b", 8, output=OUTPUT, job=skip)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    about = read_description(str(tmp_path / "a"))
    assert sorted(Path(name).name for name in about.skipped) == ["000.png", "040.png", "080.png"]
    assert sum(split.samples for split in about.splits.values()) == 97


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[str]]:
    """The URL of a bucket (a folder in its stead), and the names of the objects written there, in order."""
    written: list[str] = []
    write = targets.write_object

    def watched(url: str, data: Any) -> None:
        written.append(url.rpartition("bucket/")[2])
        write(url, data)

    monkeypatch.setattr(targets, "write_object", watched)
    for module in (targets, publish):
        monkeypatch.setattr(module, "is_remote", lambda url: str(url).startswith("file://"))
    return f"file://{tmp_path}/bucket", written


def test_bucket_gets_the_same_objects(photos, whole, bucket, tmp_path: Path):
    url, written = bucket
    staging = set(os.listdir("/tmp"))
    prepare_folder(photos, url, 8, output=OUTPUT)
    assert content(tmp_path / "bucket") == whole
    assert written[0] == "unfinished/plan.json" and written[-1] == "dataset.json"
    assert not os.listdir(tmp_path / "bucket" / "unfinished")  # folders are of this machine only
    assert not {name for name in set(os.listdir("/tmp")) - staging if name.startswith("sctrain-prepare-")}
    written.clear()
    (tmp_path / "bucket" / "unfinished" / "plan.json").write_bytes(b"of a writing that was killed at its very end")
    prepare_folder(photos, url, 8, output=OUTPUT)  # verified, not written
    assert written == [] and not os.listdir(tmp_path / "bucket" / "unfinished")


def test_interrupted_upload_goes_on(photos, whole, bucket, tmp_path: Path):
    url, written = bucket
    with pytest.raises(Interrupt):
        prepare_folder(photos, url, 8, output=OUTPUT, job=stopping_after(40))
    assert not (tmp_path / "bucket" / "dataset.json").exists()
    before = [name for name in written if name.endswith(".tar")]
    assert len(before) >= 4
    written.clear()
    (tmp_path / "bucket" / before[-1]).write_bytes(b"cut short")
    prepare_folder(photos, url, 8, output=OUTPUT)
    assert content(tmp_path / "bucket") == whole
    assert not set(before[:-1]) & set(written) and before[-1] in written
    with pytest.raises(DataError, match=r"holds another data set \(resolution 8 instead of 9"):
        prepare_folder(photos, url, 9, output=OUTPUT)


def test_what_fails_before_its_first_shard_leaves_nothing(photos, whole, bucket, tmp_path: Path):
    url, written = bucket
    with pytest.raises(Interrupt):
        prepare_folder(photos, url, 9, output=OUTPUT, job=stopping_after(1))
    assert written == []
    prepare_folder(photos, url, 8, output=OUTPUT)  # not refused for the sake of another command's work
    assert content(tmp_path / "bucket") == whole


def test_other_objects_are_never_overwritten(photos, bucket, tmp_path: Path):
    url, written = bucket
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "train-000000.tar").write_bytes(b"precious")
    with pytest.raises(DataError, match="bucket holds objects that are not a data set"):
        prepare_folder(photos, url, 8, output=OUTPUT)
    assert written == []
