"""What a recipe's images are like without having them, and a handful of random ones to train a shrunk recipe on."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np

from data_pipeline.description import (
    DESCRIPTION_FILE,
    Channels,
    DatasetDescription,
    LatentDescription,
    read_description,
)
from data_pipeline.publish import DatasetPlan, publish
from data_pipeline.readers import ArrayReader
from data_pipeline.samples import samples_of
from data_pipeline.storage import join_url
from sctrain.config.schema import RunConfig
from sctrain.errors import UserError

SIDE = 8  # pixels of the shrunk images
MOST_CLASSES = 3
PER_CLASS = 8
# (channels, side, classes) of the data sets that recipes name, by the last part of their URL. One class: unconditional.
_KNOWN = {
    "digits": (1, 8, 10),
    "cifar10": (3, 32, 10),
    "cifar10-one-class": (3, 32, 1),
    "imagenet64": (3, 64, 1000),
    "lsun-bedroom256": (3, 256, 1),
    "lsun-cat256": (3, 256, 1),
    "imagenet512-latents": (4, 64, 1000),
}


def described(config: RunConfig) -> DatasetDescription:
    """The recipe's data set: as it is here, else as it is known to be; UserError if it is neither."""
    url = config.data.url
    if Path(join_url(url, DESCRIPTION_FILE)).is_file():
        return read_description(url)
    known = _KNOWN.get(PurePosixPath(url).name)
    if known is None:
        raise UserError(f"data.url {url} is not here, and no known data set: prepare it, or name one of {list(_KNOWN)}")
    channels, side, classes = known
    names = [str(number) for number in range(classes)]
    latents = None
    if config.data.latents is not None:
        convention = config.data.latents
        latents = LatentDescription(encoder="unknown", dtype="float32", content="mean", convention=convention)
    # Not validated: there are no splits.
    return DatasetDescription.model_construct(
        channels=channels, height=side, width=side, classes=names, latents=latents
    )


def write_random_images(folder: Path, like: DatasetDescription) -> DatasetDescription:
    """A small data set in `folder`: random images of as many channels and of up to three classes."""
    channels: Channels = 1 if like.channels == 1 else 3
    classes = min(len(like.classes), MOST_CLASSES)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (classes * PER_CLASS, channels, SIDE, SIDE), dtype=np.uint8)
    labels = [number % classes for number in range(len(images))]
    samples = samples_of((f"{number:04d}" for number in range(len(images))), labels, ArrayReader(images, "numpy"))
    plan = DatasetPlan(
        name="smoke",
        classes=[str(number) for number in range(classes)],
        shape=(channels, SIDE, SIDE),
        licence="none: random numbers",
        source="numpy",
        recipe={"classes": classes, "channels": channels},
        splits={"train": samples},
    )
    return publish(folder, plan)
