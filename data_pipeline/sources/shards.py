"""Existing webdataset shards as a source: tars of `key.jpg` (or .jpeg, .png, .webp) with `key.cls` or `key.json`."""

import io
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from data_pipeline.decode import IMAGE_FORMATS, LABEL
from data_pipeline.description import DatasetDescription
from data_pipeline.encoding import Output
from data_pipeline.errors import DataError
from data_pipeline.pictures import Transform
from data_pipeline.publish import DatasetPlan, publish
from data_pipeline.readers import RangeReader
from data_pipeline.samples import listing_digest, samples_of
from data_pipeline.shards import Job
from data_pipeline.sources.checks import check_resolution, check_share
from data_pipeline.split import held_out
from data_pipeline.storage import is_remote, list_url, open_url, read_range
from data_pipeline.storage.urls import shown
from data_pipeline.tars import Member, scan_file

MOST_LABEL = 2**20  # bytes of a .cls or .json
Label = int | str


class _Found(NamedTuple):
    """One sample of a shard."""

    shard: int
    image: Member
    label: Label


def prepare_shards(
    source: str,
    dest: str,
    resolution: int,
    *,
    label_key: str = "label",
    unlabelled: bool = False,
    test_share: float = 0.0,
    output: Output | None = None,
    job: Job | None = None,
) -> DatasetDescription:
    """Write webdataset shards anew to the folder or bucket `dest`; DataError names what is wrong.

    `source` is a URL with braces (`s3://bucket/train-{000000..000999}.tar`), or several joined by `::`. A label is the
    number in `.cls`, else the value of `label_key` in `.json`: numbers are class numbers, words are sorted into
    classes. `unlabelled` puts all samples into one class. Images become RGB and are cropped to `resolution` as in ADM
    (see `center_crop`). `test_share` in [0, 1) of each class is held out.
    """
    output = output or Output()
    check_resolution(resolution)
    check_share(test_share)
    urls = list_url(source)
    found = [sample for number, url in enumerate(urls) for sample in _samples(number, url, label_key, unlabelled)]
    if not found:
        raise DataError(f"{shown(source)} holds no samples: give shards of images (.jpg, .jpeg, .png or .webp).")
    classes, labels = _classes(source, [sample.label for sample in found])
    reader = RangeReader(
        tuple(urls),
        np.array([sample.shard for sample in found], np.int32),
        np.array([sample.image.offset for sample in found], np.int64),
        np.array([sample.image.size for sample in found], np.int64),
        np.array([sample.image.name.encode("utf-8", "surrogateescape") for sample in found]),
    )
    names = [f"{sample.shard}/{sample.image.name}" for sample in found]
    stems = (_key(sample.image.name).rpartition("/")[2] for sample in found)
    samples = samples_of(stems, labels, reader).limited(output.limit)
    plan = DatasetPlan(
        name=f"shards{resolution}",
        classes=classes,
        shape=(3, resolution, resolution),
        licence="that of the source",
        source=shown(source),
        recipe={
            "resolution": resolution,
            "test_share": test_share,
            "samples": listing_digest(names, (sample.image.size for sample in found)),
            **output.recipe(),
        },
        splits=held_out(samples, [names[number] for number in samples.numbers.tolist()], test_share),
        transform=Transform(resolution, channels=3),
        output=output,
    )
    return publish(dest, plan, job)


def _samples(shard: int, url: str, label_key: str, unlabelled: bool) -> Iterator[_Found]:
    """The samples of one shard, which are runs of members with a common key."""
    for key, members in groupby(_members(url), key=lambda found: _key(found[0].name)):
        by_suffix = {member.name[len(key) + 1 :].lower(): (member, content) for member, content in members}
        images = [suffix for suffix in by_suffix if suffix in IMAGE_FORMATS]
        if len(images) != 1:
            what = "several images" if images else "no image"
            raise DataError(f"{url}: sample {key!r} holds {what} (.jpg, .jpeg, .png or .webp): take it out.")
        texts = {suffix: content for suffix, (_, content) in by_suffix.items()}
        label = 0 if unlabelled else _label(texts, label_key, f"{url}: sample {key!r}")
        yield _Found(shard, by_suffix[images[0]][0], label)


def _members(url: str) -> Iterator[tuple[Member, bytes]]:
    """The members of a shard, and the contents of those that may be labels."""
    # A remote shard is read once from start to end: a request per header would take far longer.
    with open_url(url) as file:
        for member in scan_file(file, url, seekable=not is_remote(url)):
            is_label = member.name.endswith((f".{LABEL}", ".json"))
            if is_label and member.size > MOST_LABEL:
                raise DataError(f"{url}: {member.name} has {member.size:,} bytes, too many for a label: take it out.")
            yield member, read_range(url, member.offset, member.size) if is_label else b""


def _key(name: str) -> str:
    """What webdataset takes for the key: the path up to the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _label(texts: dict[str, bytes], label_key: str, sample: str) -> Label:
    mend = "give --label-key, or --unlabelled to put all samples into one class"
    try:
        if LABEL in texts:
            return int(texts[LABEL])
        value = json.load(io.BytesIO(texts["json"]))[label_key]
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"{sample} has no label (.cls with a number, or {label_key!r} in its .json): {mend}."
        ) from error
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DataError(f"{sample} has a label that is neither a whole number nor a word: {mend}.")
    return value


def _classes(source: str, labels: Sequence[Label]) -> tuple[list[str], list[int]]:
    """Names of the classes, and the class number of each sample."""
    if all(isinstance(label, int) for label in labels):
        numbers = [int(label) for label in labels]
        if min(numbers) < 0 or max(numbers) >= 2**20:
            raise DataError(
                f"{shown(source)} has labels from {min(numbers)} to {max(numbers)}: class numbers start at 0."
            )
        return [str(number) for number in range(max(numbers) + 1)], numbers
    if not all(isinstance(label, str) for label in labels):
        raise DataError(f"{shown(source)} has both numbers and words for labels: choose one kind.")
    names = sorted({str(label) for label in labels})
    places = {name: number for number, name in enumerate(names)}
    return names, [places[str(label)] for label in labels]
