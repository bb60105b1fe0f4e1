"""scikit-learn's 1,797 real scanned digits (8x8, 10 classes) as a data set small enough for a first run on a CPU."""

from pathlib import Path

import numpy as np

from data_pipeline.description import DatasetDescription
from data_pipeline.encoding import Output
from data_pipeline.publish import DatasetPlan, publish
from data_pipeline.readers import ArrayReader
from data_pipeline.samples import samples_of
from data_pipeline.shards import Job
from data_pipeline.split import stratified_split

TEST_SHARE = 0.2
SAMPLES_PER_SHARD = 256  # several shards, so that a small run exercises the same order as a large one
BRIGHTEST = 16  # the scans hold 0..16
SOURCE = "sklearn.datasets.load_digits"


def prepare_digits(dest: str | Path, job: Job | None = None) -> DatasetDescription:
    """Write the digits to the folder or bucket `dest`, or verify the ones there; DataError if it holds anything else.

    Gray uint8 images (1, 8, 8), round(v * 255 / 16). A stratified fifth, chosen by the hash of the sample's name (see
    `stratified_split`), is held out as `test`. The same software writes the same bytes.
    """
    images, labels = _load()
    names = [f"digit-{number:04d}" for number in range(len(images))]
    samples = samples_of(names, labels, ArrayReader(images, SOURCE))
    parts = stratified_split(names, labels, TEST_SHARE)
    plan = DatasetPlan(
        name="digits",
        classes=[str(digit) for digit in range(10)],
        shape=(1, 8, 8),
        licence="Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, CC BY 4.0",
        source=SOURCE,
        recipe={"test_share": TEST_SHARE, "samples_per_shard": SAMPLES_PER_SHARD},
        splits={split: samples.take(positions) for split, positions in parts.items()},
        output=Output(samples_per_shard=SAMPLES_PER_SHARD),
    )
    return publish(dest, plan, job)


def _load() -> tuple[np.ndarray, list[int]]:
    """Images uint8 (N, 1, 8, 8) and labels."""
    from sklearn.datasets import load_digits  # takes a second to import; a run that only streams need not

    digits = load_digits()
    images = np.rint(digits.images * (255 / BRIGHTEST)).astype(np.uint8)
    return images[:, None], digits.target.tolist()
