"""Values of LMDB databases by key, without the rest of a source, so that worker processes load little."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from data_pipeline.errors import DataError

DATA = "data.mdb"


@dataclass(frozen=True, eq=False)
class LmdbReader:
    """Values of several databases by key; each process opens them for itself."""

    paths: tuple[Path, ...]
    database: np.ndarray  # (N,) int32: which of the paths
    keys: np.ndarray  # (N,) bytes

    def read(self, number: int) -> bytes:
        path = self.paths[self.database[number]]
        try:
            with _environment(path).begin(buffers=False) as transaction:
                value = transaction.get(bytes(self.keys[number]))
        except _lmdb().Error as error:
            raise _damaged(path, error) from error
        if value is None:
            raise DataError(f"{self.name(number)} is gone: put the database back and repeat the command.")
        return value

    def name(self, number: int) -> str:
        return f"{self.paths[self.database[number]]}: {bytes(self.keys[number]).decode('ascii', 'replace')}"


def keys_of(path: Path) -> np.ndarray:
    """The keys (N,) bytes of one database, as it sorts them; an LMDB's keys have no zero bytes at their end here."""
    lmdb = _lmdb()
    if not (path / DATA).is_file():
        raise DataError(f"{path} is no LMDB: give the folder that holds {DATA}, such as bedroom_train_lmdb.")
    try:
        with _environment(path).begin() as transaction, transaction.cursor() as cursor:
            keys = list(cursor.iternext(keys=True, values=False))
    except lmdb.Error as error:
        raise _damaged(path, error) from error
    if not keys:
        raise DataError(f"{path} is empty: get it again.")
    found = np.array(keys)
    if found.tolist() != keys:
        raise DataError(f"{path} has keys that end in zero bytes, which LSUN's never do: give an LSUN database.")
    return found


@lru_cache(maxsize=64)
def _environment(path: Path) -> Any:
    """Open for the life of the process; LMDB forbids opening the same one twice."""
    return _lmdb().open(str(path), readonly=True, lock=False, readahead=False, create=False)


def _lmdb() -> ModuleType:
    try:
        import lmdb
    except ImportError as error:
        raise DataError("reading LSUN needs the package lmdb: `pip install 'sctrain[lsun]'`.") from error
    return lmdb


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is damaged or no LMDB ({error}): get it again.")
