"""Weights that others have published, and the Frechet distances that they have published of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

EDM_NETWORKS = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"
EDM2_NETWORKS = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/"
OPENAI_NETWORKS = "https://openaipublic.blob.core.windows.net/consistency/"
REPRODUCTION = "https://huggingface.co/vinaymatt/edm2_sCM"
OWN_STATISTICS = "edm2_img64_custom_ref.pkl"
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7


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
    times: tuple[float, ...] | None = None  # of a student's steps after the first, radians; None: the default, 1.1
    objective: str | None = None  # where the file does not say
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
    yield from _consistency_models()
    yield from _reproduction()


def _consistency_models() -> Iterator[Entry]:
    """CM 2023, tables 2 and 3; the second step is at the level of EDM's grid that its repository's commands name."""
    for name, statistics, side, classes, one, two, level in (
        ("cd_imagenet64_lpips", "imagenet-64x64.npz", 64, 1000, 6.20, 4.70, (22, 40)),
        ("ct_imagenet64", "imagenet-64x64.npz", 64, 1000, 13.0, 11.1, (106, 201)),
        ("cd_bedroom256_lpips", "lsun-bedroom-256x256.npz", 256, 1, 7.80, 5.22, (17, 40)),
        ("ct_bedroom256", "lsun-bedroom-256x256.npz", 256, 1, 16.0, 7.85, (67, 151)),
    ):
        at = (f"{name}.pt", OPENAI_NETWORKS, statistics, side, 3, classes, "consistency")
        yield Entry(*at, 1, one)
        yield Entry(*at, 2, two, (level_time(*level),))


def _reproduction() -> Iterator[Entry]:
    """Mathew et al. 2026: the best of several seeds; their statistics of ImageNet-64 are their own."""
    for file, objective, statistics, side, classes, one, two in (
        ("cifar10/scd/network-snapshot-0071303-val.pkl", "scd", "cifar10-32x32.npz", 32, 1, 3.59, 2.39),
        ("cifar10/sct/phema-0203423-0.075.pkl", "sct", "cifar10-32x32.npz", 32, 1, 2.88, 2.09),
        ("imagenet64/scd/phema-0817889-0.080-best-1step.pkl", "scd", OWN_STATISTICS, 64, 1000, 3.59, 2.66),
        ("imagenet64/sct/phema-0817889-0.080.pkl", "sct", OWN_STATISTICS, 64, 1000, 4.34, 3.98),
    ):
        for steps, fid in ((1, one), (2, two)):
            at = (file, REPRODUCTION, statistics, side, 3, classes, "consistency", steps, fid)
            yield Entry(*at, objective=objective)


def level_time(index: int, levels: int) -> float:
    """The time of level `index` of EDM's grid from 80 down to 0.002, of so many levels, where sigma_data is 0.5."""
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    return math.atan((high + index / (levels - 1) * (low - high)) ** RHO / 0.5)
