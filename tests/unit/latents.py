"""A small data set of random latents, written as `sctrain prepare` would: shards, index, description."""

import zlib
from pathlib import Path

import numpy as np
from webdataset.writer import TarWriter

from data_pipeline.decode import encode_npy
from data_pipeline.description import DatasetDescription, LatentDescription, SplitDescription
from data_pipeline.index import ShardIndex

SHAPE = (4, 64, 64)  # 32 KiB in float16: some 120 samples to a span


def write_latents(folder: Path, samples: int, per_shard: int, content: str = "mean") -> np.ndarray:
    """One split `train`; returns what is stored, float16 (samples, C or 2C, H, W)."""
    folder.mkdir(parents=True)
    shape = (SHAPE[0] * (2 if content == "mean_std" else 1), *SHAPE[1:])
    stored = np.random.default_rng(0).random((samples, *shape), np.float32).astype(np.float16)
    rows, names, sizes = [], [], []
    for first in range(0, samples, per_shard):
        names.append(f"train-{len(names):06d}.tar")
        rows += _write_shard(folder / names[-1], len(names) - 1, first, stored[first : first + per_shard])
        sizes.append((folder / names[-1]).stat().st_size)
    key, shard, offset, size, label, crc32 = zip(*rows, strict=True)
    index = ShardIndex(
        np.array([name.encode() for name in names]),
        np.array(sizes, "<i8"),
        np.array(key),
        np.array(shard, "<i4"),
        np.array(offset, "<i8"),
        np.array(size, "<i4"),
        np.array(label, "<i4"),
        np.array(crc32, "<u4"),
    )
    with (folder / "index-train.npz").open("wb") as file:
        index.save(file)
    description = DatasetDescription(
        name="random latents",
        classes=[str(number) for number in range(10)],
        channels=SHAPE[0],
        height=SHAPE[1],
        width=SHAPE[2],
        splits={"train": SplitDescription(samples=samples, index="index-train.npz", fingerprint=index.fingerprint)},
        mean=[0.5] * SHAPE[0],
        std=[0.29] * SHAPE[0],
        latents=LatentDescription(encoder="none", dtype="float16", content=content, convention="random numbers"),
        licence="none",
        source="numpy",
        recipe={},
        software={},
    )
    (folder / "dataset.json").write_text(description.model_dump_json())
    return stored


def _write_shard(path: Path, number: int, first: int, latents: np.ndarray) -> list[tuple]:
    """Index rows of one shard; the keys of its samples are their numbers."""
    rows = []
    with path.open("w+b") as file:
        with TarWriter(file, encoder=False, mtime=0) as tar:
            for sample, latent in enumerate(latents, first):
                start = tar.tarstream.offset
                tar.write({"__key__": f"{sample:06d}", "npy": encode_npy(latent), "cls": b"%d" % (sample % 10)})
                rows.append((b"%06d" % sample, number, start, tar.tarstream.offset - start, sample % 10, 0))
        file.seek(0)
        return [(*row[:5], zlib.crc32(file.read(row[3]))) for row in rows]
