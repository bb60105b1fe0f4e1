"""Latents of auto-encoders: the published conventions by name, and images -> what is stored of them.

A convention is what range of pixels the encoder was shown, and the statistics of its output then. The same encoder
gives other latents in another convention, so data, teachers and decoders of two conventions never go together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from data_pipeline.description import LatentDescription

ConventionName = Literal["edm2", "scm", "sd"]
LatentType = Literal["float16", "float32"]
UNIT = 256  # sums of latents are counted in so many parts: whole numbers add up to the same in any order


@dataclass(frozen=True)
class Convention:
    """Pixels in [low, high] go into the encoder; the mean of its Gaussian then has these moments per channel."""

    low: float
    high: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


# Of sd-vae-ft-mse on ImageNet-512: the EDM2 repository's encoder, and Lu & Song 2024, appendix G. Stable Diffusion's,
# and DiT's: one number for all channels, which makes latents about as large as unit noise.
CONVENTIONS: Mapping[str, Convention] = {
    "edm2": Convention(0.0, 1.0, (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)),
    "scm": Convention(-1.0, 1.0, (1.56, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31)),
    "sd": Convention(-1.0, 1.0, (0.0,) * 4, (1 / 0.18215,) * 4),
}


class ImageEncoder(Protocol):
    """An auto-encoder in one convention."""

    @property
    def convention(self) -> ConventionName: ...

    @property
    def identity(self) -> str:
        """Which weights, in one word."""
        ...

    @property
    def software(self) -> tuple[str, ...]:
        """Packages whose versions may decide bits."""
        ...

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of RGB images of this size; DataError where the size does not fit."""
        ...

    def encode(self, images: np.ndarray) -> np.ndarray:
        """RGB uint8 (B, 3, H, W) -> float32 (B, 2C, h, w): means above standard deviations of the Gaussian.

        The same batch gives the same bits.
        """
        ...


@dataclass(frozen=True)
class LatentOutput:
    """That latents are written in the place of images, and how; all of it decides the bytes."""

    encoder: ImageEncoder
    flip_variant: bool = False  # the latents of mirrored training images too, as samples of their own
    dtype: LatentType = "float32"

    def recipe(self) -> dict[str, str | int | float]:
        """What the data set records of it."""
        encoder = self.encoder
        return {
            "format": "mean and std latents",
            "encoder": encoder.identity,
            "convention": encoder.convention,
            "dtype": self.dtype,
            "flip_variant": int(self.flip_variant),
        }

    @property
    def description(self) -> LatentDescription:
        encoder = self.encoder
        return LatentDescription(
            encoder=encoder.identity, dtype=self.dtype, content="mean_std", convention=encoder.convention
        )

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, 3, H, W) -> (B, 2C, h, w) in the type that is stored."""
        return self.encoder.encode(images).astype(self.dtype)


def moments(latent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums over the places of one latent (2C, h, w), and of squares: (C,) int64, in units of 1/256 and its square.

    Of the Gaussian: the sum of its means, and of mean^2 + std^2.
    """
    mean, std = np.split(latent.astype(np.float64).reshape(len(latent), -1), 2)
    sums, squares = mean.sum(axis=1), (mean * mean + std * std).sum(axis=1)
    return np.rint(UNIT * sums).astype(np.int64), np.rint(UNIT**2 * squares).astype(np.int64)
