"""The two places a data set can be written to: a folder of this machine, and a bucket."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.records import FinishedShard, Target, file_crc32, load_finished
from data_pipeline.storage import (
    delete,
    exists,
    is_remote,
    join_url,
    list_url,
    local_path,
    open_url,
    size_of,
    write_object,
)
from data_pipeline.storage.local import sync_folder, write_file

PLAN = "plan.json"
UNFINISHED = "unfinished"  # the folder of records inside a bucket

Plan = Mapping[str, str | int | float]  # all that decides the bytes


@contextmanager
def open_target(dest: str, plan: Plan) -> Iterator[Target]:
    """The place `dest`, with what an interrupted writing of the same plan left there.

    DataError if something else is there or another process is writing it.
    """
    if is_remote(dest):
        with tempfile.TemporaryDirectory(prefix="sctrain-prepare-") as staging:
            with BucketTarget.at(dest, plan, Path(staging)) as target:
                yield target
    else:
        with _folder_target(local_path(dest).absolute(), plan) as target:
            yield target


class FolderTarget:
    """A hidden sibling of the folder, which is renamed when it is complete.

    `data/` becomes the folder; `records/` remembers the finished shards.
    """

    def __init__(self, dest: Path, partial: Path):
        self._dest, self.folder, self._records = dest, partial / "data", partial / "records"
        self.folder.mkdir(exist_ok=True)
        self._records.mkdir(exist_ok=True)

    def finished(self, name: str) -> FinishedShard | None:
        shard, path = load_finished(str(self._records), name), self.folder / name
        if shard is None or not path.is_file() or file_crc32(path) != shard.record.crc32:
            return None
        return shard

    def keep(self, path: Path, shard: FinishedShard) -> None:
        path.rename(self.folder / shard.name)
        sync_folder(self.folder)
        for name, content in _files_of(shard).items():
            write_file(str(self._records / name), content)

    def publish(self, files: dict[str, bytes]) -> None:
        for part in self.folder.glob("*.part"):
            part.unlink()
        for name, content in files.items():
            write_file(str(self.folder / name), content)
        self.folder.rename(self._dest)  # replaces an empty folder, fails on any other
        sync_folder(self._dest.parent)

    @property
    def has_finished_shards(self) -> bool:
        return any(self._records.glob("*.json"))


@contextmanager
def _folder_target(dest: Path, plan: Plan) -> Iterator[FolderTarget]:
    """The partial folder of `dest`, locked while in use; it stays after a failure if it holds a finished shard."""
    partial = dest.parent / f".{dest.name}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        _lock(lock, dest)
        _check_same_plan(str(partial), plan, f"delete {partial}")
        target = FolderTarget(dest, partial)
        try:
            if not (partial / PLAN).exists():
                write_file(str(partial / PLAN), json.dumps(plan).encode())
            yield target
        except BaseException:
            if not target.has_finished_shards:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(partial)
    finally:
        os.close(lock)


def _lock(descriptor: int, dest: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(
            f"{dest} is being written by another process: wait for it, or choose another folder."
        ) from error


class BucketTarget:
    """A folder of a bucket: each shard is uploaded while the next is written, and removed here.

    Records lie in `unfinished/` beside the shards, so any machine can go on; dataset.json is the last object, after
    which they are deleted.
    """

    def __init__(self, url: str, folder: Path, plan: Plan | None):
        """`plan`: to be written with the first shard; before, nothing is worth going on with."""
        self._url, self.folder, self._plan = url, folder, plan
        self._uploads = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._upload: Future[None] | None = None

    @classmethod
    @contextmanager
    def at(cls, url: str, plan: Plan, staging: Path) -> Iterator["BucketTarget"]:
        """The target at `url`, whose last upload is awaited at the end."""
        records = join_url(url, UNFINISHED)
        _check_same_plan(records, plan, f"delete the objects below {url}")
        is_begun = exists(join_url(records, PLAN))
        if not is_begun and list_url(url):
            raise DataError(f"{url} holds objects that are not a data set: choose another folder of the bucket.")
        target = cls(url, staging, None if is_begun else plan)
        try:
            yield target
            target._await_upload()
        finally:
            target._uploads.shutdown()

    def finished(self, name: str) -> FinishedShard | None:
        shard, url = load_finished(join_url(self._url, UNFINISHED), name), join_url(self._url, name)
        if shard is None or not exists(url) or size_of(url) != shard.bytes:
            return None
        return shard

    def keep(self, path: Path, shard: FinishedShard) -> None:
        self._await_upload()
        self._upload = self._uploads.submit(self._send, path, shard)

    def publish(self, files: dict[str, bytes]) -> None:
        self._await_upload()
        for name, content in files.items():
            write_object(join_url(self._url, name), content)
        delete_records(self._url)

    def _await_upload(self) -> None:
        if self._upload is not None:
            self._upload.result()

    def _send(self, path: Path, shard: FinishedShard) -> None:
        if self._plan is not None:
            write_object(join_url(self._url, f"{UNFINISHED}/{PLAN}"), json.dumps(self._plan).encode())
            self._plan = None
        with path.open("rb") as file:
            write_object(join_url(self._url, shard.name), file)
        path.unlink()
        for name, content in _files_of(shard).items():
            write_object(join_url(self._url, f"{UNFINISHED}/{name}"), content)


def delete_records(url: str) -> None:
    """Remove what a bucket remembers of the writing of a data set that is complete."""
    records = join_url(url, UNFINISHED)
    delete([record for record in list_url(records) if record != records])


def _files_of(shard: FinishedShard) -> dict[str, bytes]:
    """The files that remember a shard, in the order in which they are written."""
    return {f"{shard.name}.npz": shard.index.encoded(), f"{shard.name}.json": shard.record.model_dump_json().encode()}


def _check_same_plan(folder: str, plan: Plan, mend: str) -> None:
    """DataError if `folder` remembers a writing of another plan: what it has finished is not for us to throw away."""
    url = join_url(folder, PLAN)
    if not exists(url):
        return
    with open_url(url) as file:
        try:
            found = json.load(file)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{url} is damaged: {mend}, and repeat the command.") from error
    if not isinstance(found, dict):
        raise DataError(f"{url} is damaged: {mend}, and repeat the command.")
    if found != plan:
        raise DataError(
            f"{folder} holds the unfinished work of another command ({difference(found, plan)}): repeat that one to go "
            f"on with it, or {mend}."
        )


def difference(found: Plan, wanted: Plan) -> str:
    """In which values two plans differ."""
    keys = sorted(found.keys() | wanted.keys())
    return ", ".join(
        f"{key} {found.get(key)} instead of {wanted.get(key)}" for key in keys if found.get(key) != wanted.get(key)
    )
