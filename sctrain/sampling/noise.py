"""The noise that samplers start from, and add on their way."""

import math
from collections.abc import Sequence

from torch import Tensor

from sctrain.randomness import Purpose, SampleGenerator


def initial_noise(seed: int, indices: Tensor, shape: Sequence[int], sigma_data: float) -> Tensor:
    """Noise z ~ N(0, sigma_d^2 I) of images number `indices` (B,): (B, *shape)."""
    return sigma_data * SampleGenerator(seed, indices, Purpose.INITIAL_NOISE).normal(shape)


def noised(x: Tensor, z: Tensor, time: float, sigma_data: float, sigma: float = 0.0) -> Tensor:
    """x_t at `time`, from EDM's x at noise level `sigma` and z ~ N(0, sigma_d^2 I), both (B, C, H, W).

    EDM's x + sqrt(sigma_t^2 - sigma^2) eps (CM 2023, algorithm 1, where `sigma` is the level at which the consistency
    function is the identity) times cos t. With sigma = 0 this is cos t x0 + sin t z.
    """
    square = math.sin(time) ** 2 - (math.cos(time) * sigma / sigma_data) ** 2
    assert square > -1e-12, "noise can only be added"
    return math.cos(time) * x + math.sqrt(max(square, 0.0)) * z
