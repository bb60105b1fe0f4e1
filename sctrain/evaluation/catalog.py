"""Weights that others have published, and the Frechet distances that they have published of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

EDM_NETWORKS = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"
EDM2_NETWORKS = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/"
OPENAI_NETWORKS = "https://openaipublic.blob.core.windows.net/consistency/"


@dataclass(frozen=True)
class Entry:
    """One figure: 50,000 images, FID as published (EDM and EDM2 publish the least of three seeds)."""

    file: str  # in the folder
    source: str  # where its publisher has it
    statistics: str  # file in fid-refs/
    side: int  # of what the network makes, pixels or latents
    channels: int
    classes: int  # 1: unconditional
    sampler: Literal["heun", "consistency"]
    steps: int
    fid: float
    times: tuple[float, ...] | None = None  # noise levels of a student's steps after the first
    latents: bool = False

    @property
    def name(self) -> str:
        return f"{self.file}, {self.sampler} {self.steps}"


def entries() -> Iterator[Entry]:
    """All of them."""
    for name, fid in (("uncond-vp", 1.97), ("cond-vp", 1.79), ("uncond-ve", 1.98), ("cond-ve", 1.79)):
        classes = 1 if name.startswith("uncond") else 10
        file = f"edm-cifar10-32x32-{name}.pkl"
        yield Entry(file, EDM_NETWORKS, "cifar10-32x32.npz", 32, 3, classes, "heun", 18, fid)
    adm = "edm-imagenet-64x64-cond-adm.pkl"
    yield Entry(adm, EDM_NETWORKS, "imagenet-64x64.npz", 64, 3, 1000, "heun", 40, 2.44)
    for size, kimg, width, fid in (
        *(("xs", 2147483, "0.135", 3.53), ("s", 2147483, "0.130", 2.56), ("m", 2147483, "0.100", 2.25)),
        *(("l", 1879048, "0.085", 2.06), ("xl", 1342177, "0.085", 1.96), ("xxl", 939524, "0.070", 1.91)),
    ):
        file = f"edm2-img512-{size}-{kimg:07d}-{width}.pkl"
        yield Entry(file, EDM2_NETWORKS, "img512.pkl", 64, 4, 1000, "heun", 32, fid, latents=True)
    for size, kimg, width, fid in (
        *(("s", 1073741, "0.075", 1.58), ("m", 2147483, "0.060", 1.43)),
        *(("l", 1073741, "0.040", 1.33), ("xl", 671088, "0.040", 1.33)),
    ):
        file = f"edm2-img64-{size}-{kimg:07d}-{width}.pkl"
        yield Entry(file, EDM2_NETWORKS, "img64.pkl", 64, 3, 1000, "heun", 32, fid)
    for name, statistics, side, classes, one, two in (
        ("cd_imagenet64_lpips", "imagenet-64x64.npz", 64, 1000, 6.20, 4.70),
        ("ct_imagenet64", "imagenet-64x64.npz", 64, 1000, 13.0, 11.1),
        ("cd_bedroom256_lpips", "lsun-bedroom-256x256.npz", 256, 1, 7.80, 5.22),
        ("ct_bedroom256", "lsun-bedroom-256x256.npz", 256, 1, 16.0, 7.85),
    ):
        for steps, fid in ((1, one), (2, two)):
            yield Entry(f"{name}.pt", OPENAI_NETWORKS, statistics, side, 3, classes, "consistency", steps, fid)
