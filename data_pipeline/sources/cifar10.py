"""CIFAR-10 as it is handed out: cifar-10-python.tar.gz or cifar-10-binary.tar.gz (Krizhevsky 2009)."""

import lzma
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.description import DatasetDescription
from data_pipeline.encoding import Output
from data_pipeline.errors import DataError
from data_pipeline.publish import DatasetPlan, publish
from data_pipeline.readers import ArrayReader
from data_pipeline.samples import listing_digest, samples_of
from data_pipeline.shards import Job
from data_pipeline.sources.plain_pickle import NotPlainError, read_plain
from data_pipeline.storage import local_path

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SHAPE = (3, 32, 32)
VALUES = 3 * 32 * 32
PARTS = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
MOST_BYTES = 2**26  # of one batch; the real ones have 31 MB
MEND = "give cifar-10-python.tar.gz or cifar-10-binary.tar.gz as its authors publish them"
_UNREADABLE = (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, lzma.LZMAError)


class _Batch(NamedTuple):
    images: np.ndarray  # uint8 (N, 3, 32, 32)
    labels: np.ndarray  # (N,) int64


def prepare_cifar10(
    archive: str | Path,
    dest: str | Path,
    *,
    one_class: bool = False,
    output: Output | None = None,
    job: Job | None = None,
) -> DatasetDescription:
    """Write CIFAR-10 to the folder or bucket `dest`, or verify the one there; DataError if the archive is another.

    The images are stored as they are. Of the version that holds pickles, only arrays and plain values are understood;
    nothing in it can run. `one_class` puts all images into one class, for models that know no labels.
    """
    output = output or Output()
    path = local_path(str(archive)).absolute()
    batches = _read(path)
    splits = {}
    for split, names in PARTS.items():
        images = np.concatenate([batches[name].images for name in names])
        labels = np.concatenate([batches[name].labels for name in names])
        keys = [f"{split}-{number:05d}" for number in range(len(images))]
        labels = np.zeros_like(labels) if one_class else labels
        splits[split] = samples_of(keys, labels, ArrayReader(images, f"{path}: {split}")).limited(output.limit)
    digest = listing_digest(batches, (zlib.crc32(batch.images.tobytes()) for batch in batches.values()))
    plan = DatasetPlan(
        name="cifar10-one-class" if one_class else "cifar10",
        classes=["image"] if one_class else CLASSES,
        shape=SHAPE,
        licence="none stated; cite Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        source=str(path),
        recipe={"batches": digest, **output.recipe(), "crop": "none"},
        splits=splits,
        output=output,
    )
    return publish(dest, plan, job)


def _read(path: Path) -> dict[str, _Batch]:
    """All batches by name, in the order of PARTS."""
    wanted = {name for names in PARTS.values() for name in names}
    found: dict[str, _Batch] = {}
    try:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if member.isreg() and name.removesuffix(".bin") in wanted:
                    found[name.removesuffix(".bin")] = _batch(tar, member, f"{path}: {name}")
            while tar.fileobj and tar.fileobj.read(2**20):
                pass  # the checksum of gzip is at its end
    except _UNREADABLE as error:
        raise DataError(f"{path} cannot be read ({error}): {MEND}.") from error
    missing = sorted(wanted - found.keys())
    if missing:
        raise DataError(f"{path} holds no {missing[0]}: {MEND}.")
    return {name: found[name] for names in PARTS.values() for name in names}


def _batch(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> _Batch:
    if member.size > MOST_BYTES:
        raise DataError(f"{name} has {member.size:,} bytes, far more than a batch: {MEND}.")
    file = tar.extractfile(member)
    assert file is not None
    data = file.read()
    batch = _from_records(data, name) if name.endswith(".bin") else _from_pickle(data, name)
    if not len(batch.images) or batch.labels.min() < 0 or batch.labels.max() >= len(CLASSES):
        raise DataError(f"{name} holds labels beyond the {len(CLASSES)} classes: {MEND}.")
    return batch


def _from_records(data: bytes, name: str) -> _Batch:
    """The binary version: one byte of label, then red, green and blue, image after image."""
    if not data or len(data) % (1 + VALUES):
        raise DataError(f"{name} is not a whole number of records of {1 + VALUES} bytes: {MEND}.")
    records = np.frombuffer(data, np.uint8).reshape(-1, 1 + VALUES)
    return _Batch(records[:, 1:].reshape(-1, *SHAPE), records[:, 0].astype(np.int64))


def _from_pickle(data: bytes, name: str) -> _Batch:
    try:
        content = read_plain(data)
        images, labels = content[b"data"], content[b"labels"]
        batch = _Batch(images.reshape(-1, *SHAPE), np.array(labels, np.int64))
    except (NotPlainError, AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{name} is not what CIFAR-10 holds ({error}): {MEND}.") from error
    if batch.images.dtype != np.uint8 or batch.labels.shape != (len(batch.images),):
        raise DataError(f"{name} is not what CIFAR-10 holds (its arrays have another form): {MEND}.")
    return batch
