"""What a data set holds, in numbers that come from its index alone: no shard is opened."""

from typing import Any

import numpy as np

from data_pipeline.dataset import ShardedDataset, open_dataset
from data_pipeline.description import read_description
from data_pipeline.index import ShardIndex

EXTREMES = 3  # classes named at either end


def statistics(url: str) -> dict[str, Any]:
    """The description of the data set `url`, and per split the distributions of classes, shards and sample sizes.

    Sizes are in bytes, tar headers and padding included. DataError if it is absent or damaged.
    """
    about = read_description(url)
    splits = {split: split_statistics(open_dataset(url, split)) for split in about.splits}
    return {
        "url": url,
        "name": about.name,
        "channels": about.channels,
        "height": about.height,
        "width": about.width,
        "classes": len(about.classes),
        "mean": about.mean,
        "std": about.std,
        "licence": about.licence,
        "source": about.source,
        "recipe": about.recipe,
        "software": about.software,
        "skipped": len(about.skipped),
        "enlarged": about.enlarged,
        "splits": splits,
    }


def split_statistics(dataset: ShardedDataset) -> dict[str, Any]:
    """Of one split; `histogram` has the number of samples of every class, in class order."""
    index, names = dataset.index, dataset.description.classes
    return {
        "samples": len(index),
        "fingerprint": index.fingerprint,
        "class_sizes": _class_sizes(index, names),
        "shards": len(index.shard_names),
        "bytes": int(index.shard_bytes.sum()),
        "shard_bytes": _spread(index.shard_bytes),
        "shard_samples": _spread(index.shard_counts),
        "sample_bytes": _spread(index.size),
        "histogram": np.bincount(index.label, minlength=len(names)).tolist(),
    }


def _class_sizes(index: ShardIndex, names: list[str]) -> dict[str, Any]:
    counts = np.bincount(index.label, minlength=len(names))
    order = np.argsort(counts, kind="stable").tolist()
    return {
        **_spread(counts),
        "empty": int((counts == 0).sum()),
        "smallest": {names[label]: int(counts[label]) for label in order[:EXTREMES]},
        "largest": {names[label]: int(counts[label]) for label in order[: -EXTREMES - 1 : -1]},
    }


def _spread(values: np.ndarray) -> dict[str, int | float]:
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}
