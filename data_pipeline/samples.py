"""What is to be written: columns that name every sample, and a reader that fetches one by number.

Columns and not objects, because ImageNet has 1.28 million samples and every process needs them.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from data_pipeline.readers import Reader

MIRRORED = b"-mirrored"
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]{1,100}")  # a dot would end the key, a slash would be a folder


@dataclass(frozen=True, eq=False)
class Samples:
    """N samples of one split, in the order of the source."""

    keys: np.ndarray  # (N,) bytes: unique names of plain characters
    labels: np.ndarray  # (N,) int32
    numbers: np.ndarray  # (N,) int64: what the reader knows them by
    reader: Reader
    mirrored: np.ndarray | None = None  # (N,) bool: left and right exchanged; None: none of them

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, positions: np.ndarray | Sequence[int]) -> Self:
        """Those at `positions` (M,)."""
        chosen = np.asarray(positions, np.int64)
        mirrored = None if self.mirrored is None else self.mirrored[chosen]
        return type(self)(self.keys[chosen], self.labels[chosen], self.numbers[chosen], self.reader, mirrored)

    def with_mirrored(self) -> Self:
        """All of them, and after them all again as mirror images; their keys end in `-mirrored`."""
        assert self.mirrored is None, "once is enough"
        twice = self.take(np.tile(np.arange(len(self)), 2))
        keys = np.concatenate([self.keys, np.char.add(self.keys, MIRRORED)])
        return type(self)(keys, twice.labels, twice.numbers, self.reader, np.arange(len(keys)) >= len(self))

    def limited(self, per_class: int | None) -> Self:
        """The first `per_class` of each class; None keeps all."""
        if per_class is None:
            return self
        by_class = np.argsort(self.labels, kind="stable")
        labels = self.labels[by_class]
        rank = np.arange(len(labels)) - np.searchsorted(labels, labels)  # of each sample within its class
        return self.take(np.sort(by_class[rank < per_class]))


def stem(name: str) -> str:
    """The file's name without folders and from its first dot on."""
    return name.rpartition("/")[2].partition(".")[0]


def samples_of(stems: Iterable[str], labels: Sequence[int] | np.ndarray, reader: Reader) -> Samples:
    """All samples of `reader`; their keys are `stems` where these are plain and unique, else numbers."""
    names = list(stems)
    if len(set(names)) != len(names) or not all(map(_PLAIN_KEY.fullmatch, names)):
        names = [f"{number:08d}" for number in range(len(names))]
    return Samples(np.array(names, "S"), np.asarray(labels, np.int32), np.arange(len(names)), reader)


def listing_digest(names: Iterable[str], sizes: Iterable[int]) -> str:
    """sha256 over the names and sizes of what a source holds, in order."""
    digest = hashlib.sha256()
    for name, size in zip(names, sizes, strict=True):
        digest.update(os.fsencode(f"{name}\0{size}\n"))
    return digest.hexdigest()
