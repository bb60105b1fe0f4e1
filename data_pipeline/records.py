"""What is remembered of each finished shard of a data set that is still being written.

Beside a finished shard lie its part of the index and a record. The record is written last, so a shard that has one is
whole, and an interrupted preparation goes on after the last of them.
"""

import os
import zlib
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.errors import DataError
from data_pipeline.index import ShardIndex, load_index
from data_pipeline.storage import exists, join_url, open_url


class ShardRecord(BaseModel):
    """One finished shard; its samples are in its part of the index."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    crc32: int  # of the whole file
    end: int  # position in the order of writing after its last sample
    sums: list[int]  # per channel, of all pixels
    squares: list[int]
    skipped: list[str]  # names of unreadable samples met while it was written
    enlarged: int  # samples that were smaller than the resolution
    fingerprint: str  # of its part of the index


class FinishedShard(NamedTuple):
    """A shard that is written, and its part of the index."""

    record: ShardRecord
    index: ShardIndex  # of this one shard

    @property
    def name(self) -> str:
        return self.index.shard_names[0].decode()

    @property
    def bytes(self) -> int:
        return int(self.index.shard_bytes[0])


class Target(Protocol):
    """Where a data set goes. Nobody sees it there before it is complete."""

    folder: Path  # on this machine: where files are first written

    def finished(self, name: str) -> FinishedShard | None:
        """The shard of this name if it is there and whole."""
        ...

    def keep(self, path: Path, shard: FinishedShard) -> None:
        """Take over the shard that was written to `path`, and remember it."""
        ...

    def publish(self, files: dict[str, bytes]) -> None:
        """Write the files that make the data set complete, in this order."""
        ...


def load_finished(folder: str, name: str) -> FinishedShard | None:
    """What the folder or bucket of records `folder` remembers of a shard; None where there is nothing of use."""
    record_url, index_url = join_url(folder, f"{name}.json"), join_url(folder, f"{name}.npz")
    if not exists(record_url) or not exists(index_url):
        return None
    try:
        with open_url(record_url) as file:
            record = ShardRecord.model_validate_json(file.read())
        shard = FinishedShard(record, load_index(index_url))
    except (DataError, ValidationError):  # a crash of the machine can leave anything; that shard is written again
        return None
    whole = shard.index.fingerprint == record.fingerprint and shard.index.shard_names.tolist() == [name.encode()]
    return shard if whole else None


def sync(file: IO[bytes]) -> None:
    """Force a file to disk."""
    file.flush()
    os.fsync(file.fileno())


def file_crc32(path: Path) -> int:
    """Checksum of a whole file."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            checksum = zlib.crc32(block, checksum)
    return checksum
