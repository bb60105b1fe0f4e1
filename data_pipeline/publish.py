"""Writing a whole data set so that it is complete or absent.

Everything goes to a hidden sibling folder that is renamed at the end. A folder that is already there is verified
instead if it came from the same recipe, and refused if it is anything else.
"""

import fcntl
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from data_pipeline.dataset import open_dataset
from data_pipeline.description import (
    DESCRIPTION_FILE,
    Channels,
    DatasetDescription,
    SplitDescription,
    read_description,
)
from data_pipeline.errors import DataError
from data_pipeline.shards import Progress, Source, index_name, sync, write_split

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetPlan:
    """What is to be written; see DatasetDescription for the fields of the same names."""

    name: str
    classes: list[str]
    shape: tuple[Channels, int, int]  # (C, H, W)
    licence: str
    source: str
    recipe: dict[str, str | int | float]
    splits: Mapping[str, Sequence[Source]]
    samples_per_shard: int


def publish(dest: Path, plan: DatasetPlan, progress: Progress) -> DatasetDescription:
    """Write the data set `plan` to the folder `dest`, or verify the one that is there; DataError if it is another."""
    dest = dest.absolute()
    try:
        existing = _existing(dest, plan)
        if existing is None:
            return _write(dest, plan, progress)
    except OSError as error:
        raise DataError(
            f"{dest} cannot be written ({error.strerror}): free space or rights there, or choose another folder."
        ) from error
    _log.info("%s is complete: index, fingerprint and shard sizes verified.", dest)
    return existing


def _existing(dest: Path, plan: DatasetPlan) -> DatasetDescription | None:
    """The verified description of a data set of the same plan; None where there is nothing yet."""
    if not dest.exists() or (dest.is_dir() and not any(dest.iterdir())):
        return None
    if not (dest / DESCRIPTION_FILE).is_file():
        raise DataError(f"{dest} exists and is not a data set: choose another folder or remove it.")
    found = read_description(str(dest))
    if (found.name, found.recipe) != (plan.name, plan.recipe):
        difference = _difference(found, plan)
        raise DataError(f"{dest} holds another data set ({difference}): choose another folder or remove it.")
    for split in found.splits:
        open_dataset(str(dest), split)
    return found


def _difference(found: DatasetDescription, plan: DatasetPlan) -> str:
    if found.name != plan.name:
        return f"{found.name}, not {plan.name}"
    keys = sorted(found.recipe.keys() | plan.recipe.keys())
    return ", ".join(
        f"{key} {found.recipe.get(key)} instead of {plan.recipe.get(key)}"
        for key in keys
        if found.recipe.get(key) != plan.recipe.get(key)
    )


def _write(dest: Path, plan: DatasetPlan, progress: Progress) -> DatasetDescription:
    dest.parent.mkdir(parents=True, exist_ok=True)
    with _partial_folder(dest) as folder:
        description = _write_files(folder, plan, progress)
        os.rename(folder, dest)  # replaces an empty folder, fails on any other
        _sync_folder(dest.parent)
    return description


def _write_files(folder: Path, plan: DatasetPlan, progress: Progress) -> DatasetDescription:
    splits, histograms = {}, {}
    for split, sources in plan.splits.items():
        index, histograms[split] = write_split(folder, split, sources, plan.samples_per_shard, progress)
        splits[split] = SplitDescription(samples=len(index), index=index_name(split), fingerprint=index.fingerprint)
    mean, std = _pixel_moments(histograms["train"])
    channels, height, width = plan.shape
    description = DatasetDescription(
        name=plan.name,
        classes=plan.classes,
        channels=channels,
        height=height,
        width=width,
        splits=splits,
        mean=mean,
        std=std,
        licence=plan.licence,
        source=plan.source,
        recipe=plan.recipe,
        software={package: version(package) for package in ("numpy", "pillow", "webdataset")},
    )
    with (folder / DESCRIPTION_FILE).open("wb") as file:
        file.write(description.model_dump_json(indent=2).encode() + b"\n")
        sync(file)
    _sync_folder(folder)
    return description


def _pixel_moments(histogram: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, pixels in [0, 1], of a histogram (C, 256)."""
    values = np.arange(256) / 255
    share = histogram / histogram.sum(axis=1, keepdims=True)
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(axis=1)
    return mean.tolist(), np.sqrt(variance).tolist()


@contextmanager
def _partial_folder(dest: Path) -> Iterator[Path]:
    """A fresh hidden sibling of `dest`, locked while in use and gone afterwards unless it was renamed."""
    _remove_abandoned(dest)
    folder = dest.parent / f".{dest.name}.{uuid.uuid4().hex[:8]}.partial"
    folder.mkdir()
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _remove_abandoned(dest: Path) -> None:
    """Delete what killed writers of `dest` left behind: their locks ended with them."""
    for folder in dest.parent.glob(f".{dest.name}.????????.partial"):
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        except BlockingIOError:
            _log.info("%s is being written by another process.", folder)
        finally:
            os.close(lock)


def _sync_folder(folder: Path) -> None:
    """Make the names inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
