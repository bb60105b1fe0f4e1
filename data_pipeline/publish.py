"""Writing a whole data set so that it is complete or absent.

What is there already is verified instead if it came from the same recipe, and refused if it is anything else.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
from data_pipeline.encoding import Encoder, Output
from data_pipeline.errors import DataError
from data_pipeline.latents import UNIT
from data_pipeline.pictures import Transform
from data_pipeline.records import Target
from data_pipeline.samples import Samples
from data_pipeline.shards import Job, WrittenSplit, index_name, write_split
from data_pipeline.storage import exists, is_remote, join_url, local_path
from data_pipeline.targets import Plan, delete_records, difference, open_target

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetPlan:
    """What is to be written; see DatasetDescription for the fields of the same names."""

    name: str
    classes: list[str]
    shape: tuple[Channels, int, int]  # (C, H, W) of the pixels
    licence: str
    source: str
    recipe: dict[str, str | int | float]
    splits: Mapping[str, Samples]
    transform: Transform | None = None  # None where the readers of the samples give pixels
    output: Output = field(default_factory=Output)


def publish(dest: str | Path, plan: DatasetPlan, job: Job | None = None) -> DatasetDescription:
    """Write the data set `plan` to the folder or bucket `dest`, or the rest of it, or verify the one that is there.

    DataError if `dest` holds anything else, and where an image is unreadable that is not to be skipped.
    """
    url, plan = str(dest), _with_variants(plan)
    plan.output.check()
    try:
        existing = _existing(url, plan)
        if existing is None:
            with open_target(url, _identity(plan)) as target:
                return _write(target, plan, job or Job())
    except OSError as error:
        raise DataError(
            f"{url} cannot be written ({error.strerror}): free space or rights there, or choose another folder."
        ) from error
    _log.info("%s is complete: index, fingerprint and shard sizes verified.", url)
    return existing


def _with_variants(plan: DatasetPlan) -> DatasetPlan:
    """Mirrored training images besides, where latents of them are wanted. DataError where there can be no latents."""
    latents = plan.output.latents
    if latents is None:
        return plan
    channels, height, width = plan.shape
    if channels != 3:
        raise DataError("auto-encoders see RGB images, these are gray: prepare them without --encode.")
    latents.encoder.shape(height, width)
    if not latents.flip_variant:
        return plan
    return replace(plan, splits={**plan.splits, "train": plan.splits["train"].with_mirrored()})


def _existing(url: str, plan: DatasetPlan) -> DatasetDescription | None:
    """The verified description of a data set of the same plan; None where there is nothing yet."""
    if not exists(join_url(url, DESCRIPTION_FILE)):
        if not is_remote(url):
            _check_empty(local_path(url))
        return None
    found = read_description(url)
    if (found.name, found.recipe) != (plan.name, plan.recipe):
        text = difference({"name": found.name, **found.recipe}, {"name": plan.name, **plan.recipe})
        raise DataError(f"{url} holds another data set ({text}): choose another folder or remove it.")
    for split in found.splits:
        open_dataset(url, split)
    if is_remote(url):
        delete_records(url)  # of a writing that was ended right before it did so itself
    return found


def _check_empty(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DataError(f"{folder} exists and is not a data set: choose another folder or remove it.")


def _identity(plan: DatasetPlan) -> Plan:
    """All that decides the bytes, so that only the same command goes on where another stopped."""
    samples = {f"{split} samples": len(samples) for split, samples in plan.splits.items()}
    return {"name": plan.name, "classes": len(plan.classes), **samples, **plan.recipe, **_software(plan)}


def _software(plan: DatasetPlan) -> dict[str, str]:
    latents = plan.output.latents
    also = () if latents is None else latents.encoder.software
    return {package: version(package) for package in ("numpy", "pillow", "webdataset", *also)}


def _write(target: Target, plan: DatasetPlan, job: Job) -> DatasetDescription:
    output = plan.output
    image_format = output.image_format if output.latents is None else None
    written = {
        split: write_split(target, split, Encoder(samples, plan.transform, image_format, output.quality), output, job)
        for split, samples in plan.splits.items()
    }
    description = _description(plan, written)
    files = {index_name(split): part.index.encoded() for split, part in written.items()}
    target.publish({**files, DESCRIPTION_FILE: description.model_dump_json(indent=2).encode() + b"\n"})
    return description


def _description(plan: DatasetPlan, written: Mapping[str, WrittenSplit]) -> DatasetDescription:
    latents = plan.output.latents
    channels, height, width = plan.shape if latents is None else latents.encoder.shape(*plan.shape[1:])
    mean, std = _moments(written["train"], height * width, 255 if latents is None else UNIT)
    return DatasetDescription(
        name=plan.name,
        classes=plan.classes,
        channels=channels,
        height=height,
        width=width,
        splits={
            split: SplitDescription(
                samples=len(part.index), index=index_name(split), fingerprint=part.index.fingerprint
            )
            for split, part in written.items()
        },
        mean=mean,
        std=std,
        latents=None if latents is None else latents.description,
        licence=plan.licence,
        source=plan.source,
        skipped=[name for part in written.values() for name in part.skipped],
        enlarged=sum(part.enlarged for part in written.values()),
        recipe=plan.recipe,
        software=_software(plan),
    )


def _moments(part: WrittenSplit, places: int, unit: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of samples of so many places; the sums of 1/`unit` are exact."""
    count = len(part.index) * places
    pairs = list(zip(part.sums.tolist(), part.squares.tolist(), strict=True))
    mean = [total / (unit * count) for total, _ in pairs]
    variance = [(count * squares - total * total) / (unit * count) ** 2 for total, squares in pairs]
    return mean, np.sqrt(variance).tolist()
