"""LSUN as it is handed out: one LMDB per category whose values are encoded images (bedroom_train_lmdb and the like)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.description import DatasetDescription
from data_pipeline.encoding import Output
from data_pipeline.errors import DataError
from data_pipeline.pictures import Transform
from data_pipeline.publish import DatasetPlan, publish
from data_pipeline.samples import Samples, listing_digest, samples_of
from data_pipeline.shards import Job
from data_pipeline.sources.checks import check_resolution
from data_pipeline.sources.lmdb_reader import LmdbReader, keys_of
from data_pipeline.storage import local_path


def prepare_lsun(
    databases: Sequence[str | Path],
    dest: str | Path,
    resolution: int,
    *,
    val: Sequence[str | Path] = (),
    output: Output | None = None,
    job: Job | None = None,
) -> DatasetDescription:
    """Write LSUN's categories to the folder or bucket `dest`, or verify the one there; DataError names what is wrong.

    Each of `databases` is the folder of an LMDB and becomes a class, named like the folder up to `_train_lmdb`; those
    of `val`, which become the split `test`, must be of the same categories. Images become RGB and are cropped to
    `resolution` as in ADM (see `center_crop`).
    """
    output = output or Output()
    check_resolution(resolution)
    paths = sorted((local_path(str(path)).absolute() for path in databases), key=_category)
    classes = [_category(path) for path in paths]
    if len(set(classes)) != len(classes):
        raise DataError(f"a category of {', '.join(classes)} is given twice: give each database once.")
    splits, digests = {}, {}
    for split, found in {"train": paths, "test": _of_classes(val, classes)}.items():
        if found:
            samples, digests[f"{split}_keys"] = _samples(found)
            splits[split] = samples.limited(output.limit)
    plan = DatasetPlan(
        name="-".join(["lsun", *classes])[:60] + str(resolution),
        classes=classes,
        shape=(3, resolution, resolution),
        licence="none stated by LSUN; the images belong to their owners",
        source=", ".join(map(str, paths)),
        recipe={"resolution": resolution, **digests, **output.recipe()},
        splits=splits,
        transform=Transform(resolution, channels=3),
        output=output,
    )
    return publish(dest, plan, job)


def _category(path: Path) -> str:
    name = path.name
    for ending in ("_lmdb", "_train", "_val"):
        name = name.removesuffix(ending)
    return name


def _of_classes(val: Sequence[str | Path], classes: Sequence[str]) -> list[Path]:
    """The validation databases in the order of the classes."""
    found = {_category(path): path for path in (local_path(str(path)).absolute() for path in val)}
    if found and sorted(found) != sorted(classes):
        raise DataError(f"--val has the categories {', '.join(found)}, not {', '.join(classes)}: give one for each.")
    return [found[name] for name in classes if found]


def _samples(paths: Sequence[Path]) -> tuple[Samples, str]:
    keys = [keys_of(path) for path in paths]
    labels = np.repeat(np.arange(len(keys), dtype=np.int32), [len(found) for found in keys])
    every = np.concatenate(keys)
    names = [key.decode("ascii", "replace") for key in every.tolist()]
    return samples_of(names, labels, LmdbReader(tuple(paths), labels, every)), listing_digest(names, labels.tolist())
