"""The cache: each span fetched once by whoever comes first, never half there, never more than the limit."""

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from span_cache_user import SIZE, content

from data_pipeline import cache as cache_module
from data_pipeline.cache import CacheOptions, SpanCache
from data_pipeline.errors import DataError

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests/unit/span_cache_user.py"
MIB = 2**20


def user(folder: Path, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, str(PROGRAM), str(folder), *map(str, arguments)]
    return subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def opened(folder: Path, limit: int = 2**30) -> SpanCache:
    return SpanCache(CacheOptions(str(folder), limit), "abc")


def whole(cache: SpanCache, span: int, size: int = SIZE) -> bytes | None:
    found = cache.read(span, [(0, size)])
    return found[0] if found else None


def never() -> list[bytes]:
    raise AssertionError("this span was to be here")


def test_processes_fetch_each_span_once_and_read_it_all(tmp_path: Path):
    users = [user(tmp_path / "cache", "read", 60, seed, tmp_path / "log") for seed in range(4)]
    for process in users:
        assert process.communicate(timeout=30)[1] == "" and process.returncode == 0
    loaded = [int(line) for line in (tmp_path / "log").read_text().split()]
    assert sorted(loaded) == list(range(60))
    assert not list((tmp_path / "cache").rglob("*.part"))


@pytest.mark.parametrize("action", ["hang-loading", "hang-writing"])
def test_a_killed_process_leaves_neither_half_an_entry_nor_a_claim(tmp_path: Path, action: str):
    process = user(tmp_path, action, 7)
    assert process.stdout is not None and process.stdout.readline() == "hanging\n"
    cache = opened(tmp_path)
    assert whole(cache, 7) is None
    assert cache.fill(7, SIZE, never, wait=False)  # it is alive
    process.kill()
    process.communicate()
    assert whole(cache, 7) is None and len(list(tmp_path.rglob("*.part"))) == 1
    assert cache.fill(7, SIZE, lambda: [content(7)]) and whole(cache, 7) == content(7)
    assert not list(tmp_path.rglob("*.part"))


def test_who_takes_too_long_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_module, "PATIENCE", 0.05)
    cache = opened(tmp_path)
    with (tmp_path / "abc/0000003.part").open("w") as stalled:
        fcntl.flock(stalled, fcntl.LOCK_EX)
        assert not cache.fill(3, 4, never)
        assert whole(cache, 3) is None  # the claim is still theirs
    assert cache.fill(3, 4, lambda: [b"ou", b"rs"]) and whole(cache, 3, 4) == b"ours"


def test_a_failed_fetch_is_told_and_leaves_nothing(tmp_path: Path):
    def fail() -> Iterator[bytes]:
        yield b"half"
        raise DataError("the store is away.")

    cache = opened(tmp_path)
    with pytest.raises(DataError, match="away"):
        cache.fill(0, 8, fail)
    assert not list((tmp_path / "abc").iterdir())


def test_the_limit_holds_and_what_was_used_last_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_module, "TOUCH", 0.0)
    (tmp_path / "abc").mkdir()
    (tmp_path / "abc/notes.txt").write_bytes(bytes(3 * MIB))  # not ours: neither counted nor removed
    cache, other = opened(tmp_path, 10 * MIB), SpanCache(CacheOptions(str(tmp_path), 10 * MIB), "def")
    entries: list[Path] = []
    for span in range(30):
        (other if span % 3 == 2 else cache).fill(span, MIB, lambda: [bytes(MIB)])
        assert whole(cache, 0, 1) == b"\0"  # used again and again
        entries = [path for path in tmp_path.rglob("*") if path.name.isdigit()]
        assert sum(path.stat().st_size for path in entries) <= 10 * MIB
    assert len(entries) >= 8 and {int(path.name) for path in entries} > {0, 25, 26, 27, 28, 29}
    assert cache.counts["evicted"] + other.counts["evicted"] == 30 - len(entries)
    assert (tmp_path / "abc/notes.txt").exists()
    assert not cache.fill(99, 11 * MIB, never) and whole(cache, 99) is None


def test_abandoned_parts_count_and_are_removed(tmp_path: Path):
    (tmp_path / "abc").mkdir()
    (tmp_path / "abc/0000005.part").write_bytes(bytes(9 * MIB))
    cache = opened(tmp_path, 10 * MIB)
    cache.fill(0, 2 * MIB, lambda: [bytes(2 * MIB)])
    assert [path.name for path in (tmp_path / "abc").iterdir()] == ["0000000"]


def test_an_entry_that_is_removed_can_still_be_read(tmp_path: Path):
    cache = opened(tmp_path)
    cache.fill(0, 6, lambda: [b"abcdef"])
    read = os.pread

    def read_late(*arguments: int) -> bytes:
        (tmp_path / "abc/0000000").unlink(missing_ok=True)
        return read(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pread", read_late)
        assert cache.read(0, [(1, 2), (4, 2)]) == [b"bc", b"ef"]
    assert cache.read(0, [(1, 2)]) is None


def test_a_full_disk_is_said_once_and_does_not_stop_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def no_space(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = opened(tmp_path)
    monkeypatch.setattr(os, "write", no_space)
    for span in (1, 2):
        assert not cache.fill(span, 3, lambda: [b"abc"]) and whole(cache, span) is None
    assert cache.is_full and not list((tmp_path / "abc").iterdir())
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path} is on a full disk: the data set is read from its store without a cache."
    ]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path / f"sctrain-cache-{os.getuid()}"


def test_the_default_folder_is_this_users_alone(temporary: Path):
    SpanCache(CacheOptions(), "abc")
    assert temporary.stat().st_mode & 0o777 == 0o700
    temporary.chmod(0o755)
    with pytest.raises(DataError, match="is open to other users: remove it"):
        SpanCache(CacheOptions(), "abc")
    (temporary / "abc").rmdir()
    temporary.rmdir()
    temporary.symlink_to("/tmp")
    with pytest.raises(DataError, match="is open to other users"):
        SpanCache(CacheOptions(), "abc")


def test_folders_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"the cache .*/file cannot be written \(.*\): name another folder"):
        opened(tmp_path / "file")
