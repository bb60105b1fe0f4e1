"""Data sets of random latents, to measure and to test with: as `sctrain prepare` writes them, but for the content."""

import io
import zlib
from itertools import pairwise
from typing import Literal

import numpy as np
from webdataset.writer import TarWriter

from data_pipeline.decode import LABEL, encode_npy
from data_pipeline.description import (
    DESCRIPTION_FILE,
    DatasetDescription,
    LatentDescription,
    SplitDescription,
)
from data_pipeline.index import ShardIndex
from data_pipeline.order import random_bits
from data_pipeline.shards import index_name, shard_name
from data_pipeline.storage import join_url, write_object

SHAPE = (4, 64, 64)  # of ImageNet-512 behind the usual auto-encoders; 32 KiB in float16
CLASSES = 10
GENERATED = "random latents"  # the name of such a data set

Content = Literal["mean", "mean_std"]


def generated_latents(first: int, count: int, content: Content = "mean") -> np.ndarray:
    """What is stored of samples number `first` to `first + count` - 1: float16 (count, C or 2C, H, W) in [0, 1)."""
    channels = SHAPE[0] * (2 if content == "mean_std" else 1)
    return np.stack([_latent(number, (channels, *SHAPE[1:])) for number in range(first, first + count)])


def _latent(number: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.Generator(random_bits(0, number)).random(shape, np.float32).astype(np.float16)


def write_latents(url: str, samples: int, shards: int, content: Content = "mean") -> None:
    """Write one split `train` into the folder or bucket `url`, its description last; the same call, the same bytes."""
    parts: list[ShardIndex] = []
    bounds = [samples * shard // shards for shard in range(shards + 1)]
    for number, (first, end) in enumerate(pairwise(bounds)):
        data, part = _shard(shard_name("train", number), first, end - first, content)
        write_object(join_url(url, shard_name("train", number)), data)
        parts.append(part)
    index = ShardIndex.joined(parts)
    write_object(join_url(url, index_name("train")), index.encoded())
    write_object(join_url(url, DESCRIPTION_FILE), _description(index, content).model_dump_json(indent=2).encode())


def _shard(name: str, first: int, count: int, content: Content) -> tuple[bytes, ShardIndex]:
    """The bytes of a shard, and its part of the index; the keys of samples are their numbers."""
    file, sizes = io.BytesIO(), []
    with TarWriter(file, encoder=False, mtime=0) as tar:
        for number, latent in enumerate(generated_latents(first, count, content), first):
            start = tar.tarstream.offset
            tar.write({"__key__": f"{number:07d}", "npy": encode_npy(latent), LABEL: b"%d" % (number % CLASSES)})
            sizes.append(tar.tarstream.offset - start)
    data, ends = file.getvalue(), np.cumsum([0, *sizes]).tolist()
    return data, ShardIndex.of_shard(
        name,
        len(data),
        keys=[b"%07d" % number for number in range(first, first + count)],
        labels=[number % CLASSES for number in range(first, first + count)],
        sizes=sizes,
        checksums=[zlib.crc32(data[start:end]) for start, end in pairwise(ends)],
    )


def _description(index: ShardIndex, content: Content) -> DatasetDescription:
    return DatasetDescription(
        name=GENERATED,
        classes=[str(number) for number in range(CLASSES)],
        channels=SHAPE[0],
        height=SHAPE[1],
        width=SHAPE[2],
        splits={
            "train": SplitDescription(samples=len(index), index=index_name("train"), fingerprint=index.fingerprint)
        },
        mean=[0.5] * SHAPE[0],
        std=[12**-0.5] * SHAPE[0],
        latents=LatentDescription(encoder="none", dtype="float16", content=content, convention="random numbers"),
        licence="none",
        source="random numbers",
        recipe={},
        software={},
    )
