"""scikit-learn's 1,797 real scanned digits (8x8, 10 classes) as a data set small enough for a first run on a CPU."""

from functools import partial
from pathlib import Path

import numpy as np

from data_pipeline.description import DatasetDescription
from data_pipeline.publish import DatasetPlan, publish
from data_pipeline.shards import Source
from data_pipeline.split import stratified_split
from data_pipeline.storage import local_path

TEST_SHARE = 0.2
SAMPLES_PER_SHARD = 256  # several shards, so that a small run exercises the same order as a large one
BRIGHTEST = 16  # the scans hold 0..16


def prepare_digits(dest: str | Path) -> DatasetDescription:
    """Write the digits to the folder `dest`, or verify the ones there; DataError if it holds anything else.

    Gray uint8 images (1, 8, 8), round(v * 255 / 16). A stratified fifth, chosen by the hash of the sample's name (see
    `stratified_split`), is held out as `test`. The same software writes the same bytes.
    """
    images, labels = _load()
    names = [f"digit-{number:04d}" for number in range(len(images))]
    sources = [
        Source(name, label, partial(_same, image)) for name, label, image in zip(names, labels, images, strict=True)
    ]
    parts = stratified_split(names, labels, TEST_SHARE)
    plan = DatasetPlan(
        name="digits",
        classes=[str(digit) for digit in range(10)],
        shape=(1, 8, 8),
        licence="Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, CC BY 4.0",
        source="sklearn.datasets.load_digits",
        recipe={"test_share": TEST_SHARE, "samples_per_shard": SAMPLES_PER_SHARD},
        splits={split: [sources[p] for p in positions] for split, positions in parts.items()},
        samples_per_shard=SAMPLES_PER_SHARD,
    )
    return publish(local_path(str(dest)), plan, list)


def _load() -> tuple[np.ndarray, list[int]]:
    """Images uint8 (N, 1, 8, 8) and labels."""
    from sklearn.datasets import load_digits  # takes a second to import; a run that only streams need not

    digits = load_digits()
    images = np.rint(digits.images * (255 / BRIGHTEST)).astype(np.uint8)
    return images[:, None], digits.target.tolist()


def _same(image: np.ndarray) -> np.ndarray:
    return image
