"""The held-out split: fixed, stratified, and decided by nothing but the samples' names."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.samples import Samples


def held_out(samples: Samples, names: Sequence[str], test_share: float) -> dict[str, Samples]:
    """The splits `train` and `test` of `samples`, whose `names` decide the side; `train` alone where the share is 0."""
    if test_share == 0:
        return {"train": samples}
    if min(np.unique(samples.labels, return_counts=True)[1], default=0) < 2:
        raise DataError(
            "a class has a single image, but training and test need one each: add images, raise --limit, or prepare "
            "without a test split (--test-share 0)."
        )
    parts = stratified_split(names, samples.labels.tolist(), test_share)
    return {split: samples.take(positions) for split, positions in parts.items()}


def stratified_split(names: Sequence[str], labels: Sequence[int], test_share: float) -> dict[str, list[int]]:
    """Positions of the `train` and `test` samples, each ascending.

    Of every class, the round(test_share * count) samples (at least one, and at least one stays for training) whose
    names have the smallest sha256 are held out. So almost every sample keeps its side when others are added later.
    Each class must have two samples or more.
    """
    members: defaultdict[int, list[int]] = defaultdict(list)
    for position, label in enumerate(labels):
        members[label].append(position)
    test: set[int] = set()
    for positions in members.values():
        assert len(positions) >= 2
        held_out = min(max(round(test_share * len(positions)), 1), len(positions) - 1)
        test.update(sorted(positions, key=lambda position: _digest(names[position]))[:held_out])
    return {"train": [p for p in range(len(names)) if p not in test], "test": sorted(test)}


def _digest(name: str) -> bytes:
    return hashlib.sha256(os.fsencode(name)).digest()
