"""Zero-shot editing in TrigFlow variables: CM 2023 algorithm 4, SDEdit's strokes, denoising and interpolation.

N(x, t^2) of the paper's noise levels is cos t x + sin t z here. Like the samplers these are free functions, and noise
is keyed by (seed, index of the image), so a picture does not depend on how a batch is split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sctrain.editing.measurements import Measurement
from sctrain.parameterization import Network
from sctrain.processes import T_MAX, denoise
from sctrain.randomness import Purpose, SampleGenerator
from sctrain.sampling import initial_noise

# The noise levels of stroke-guided generation (CM 2023, appendix D), where sigma_data is 0.5.
STROKE_SIGMAS = (5.38, 2.24)


@torch.no_grad()
def zero_shot(
    network: Network,
    y: Tensor,
    measurement: Measurement,
    labels: Tensor,
    sigma_data: float,
    times: Sequence[float],
    seed: int,
    indices: Tensor,
    anchor: float = 0.0,
) -> Tensor:
    """Images like the data that have the known coefficients of `y` (CM 2023, algorithm 4): (B, C, H, W).

    `y` is in model space and may hold anything where it is unknown; `times` descend within (0, pi/2), one
    evaluation of the network at each. `anchor` is the noise level at which the consistency function is the identity.
    """

    def known_again(x: Tensor) -> Tensor:
        return measurement.replaced(x, y)

    return _rounds(network, measurement.projected(y), known_again, labels, sigma_data, times, seed, indices, anchor)


@torch.no_grad()
def from_strokes(
    network: Network,
    strokes: Tensor,
    labels: Tensor,
    sigma_data: float,
    times: Sequence[float],
    seed: int,
    indices: Tensor,
    anchor: float = 0.0,
) -> Tensor:
    """Images like the data that resemble `strokes` (B, C, H, W) as far as the noise at times[0] leaves it (SDEdit).

    Algorithm 4 with every coefficient unknown, but for its first line, which would erase the strokes.
    """
    return _rounds(network, strokes, lambda x: x, labels, sigma_data, times, seed, indices, anchor)


@torch.no_grad()
def interpolated(
    network: Network, first: Tensor, second: Tensor, share: Tensor, labels: Tensor, sigma_data: float
) -> Tensor:
    """Images of the noises at `share` (N,) of the way between two, `first` and `second` (C, H, W): (N, C, H, W)."""
    z = slerp(first, second, share)
    return _consistency(network, z, torch.full((len(z),), T_MAX).to(z), labels, sigma_data)


@torch.no_grad()
def denoised(network: Network, noisy: Tensor, labels: Tensor, sigma_data: float, time: float) -> Tensor:
    """F(x, t) of `noisy` = x0 + sigma z with sigma = sigma_d tan t, z standard normal: (B, C, H, W)."""
    t = torch.full((len(noisy),), time, dtype=noisy.dtype, device=noisy.device)
    return _consistency(network, math.cos(time) * noisy, t, labels, sigma_data)


def slerp(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Points at `share` (N,) of the great circle from `first` to `second` (C, H, W): (N, C, H, W).

    [sin((1 - a) psi) z1 + sin(a psi) z2] / sin psi, psi the angle between the two, which must not be parallel.
    """
    a = share.to(first).reshape(-1, *(1,) * first.ndim)
    cosine = (first * second).sum() / (first.norm() * second.norm())
    psi = cosine.clamp(-1, 1).acos()
    return (((1 - a) * psi).sin() * first + (a * psi).sin() * second) / psi.sin()


def _rounds(
    network: Network,
    x: Tensor,
    mended: Callable[[Tensor], Tensor],
    labels: Tensor,
    sigma_data: float,
    times: Sequence[float],
    seed: int,
    indices: Tensor,
    anchor: float,
) -> Tensor:
    """Noise, one evaluation and `mended`, at each of the times."""
    level = 0.0  # of the noise in x: what a consistency function with an anchor gives still has that much
    for time, z in zip(times, _noises(seed, indices, x, sigma_data)):  # noqa: B905  (there is always more noise)
        t = torch.full((len(x),), time, dtype=x.dtype, device=x.device)
        # N(x, sigma^2 - level^2) times cos t: cos t x + sin t z where the level is 0.
        missing = math.sin(time) ** 2 - (math.cos(time) * level / sigma_data) ** 2
        x = math.cos(time) * x + math.sqrt(max(missing, 0.0)) * z
        x, level = mended(_consistency(network, x, t, labels, sigma_data)), anchor
    return x


def _consistency(network: Network, x: Tensor, t: Tensor, labels: Tensor, sigma_data: float) -> Tensor:
    return denoise(x, network(x / sigma_data, t, labels)[0], t, sigma_data)


def _noises(seed: int, indices: Tensor, like: Tensor, sigma_data: float) -> Iterator[Tensor]:
    """What the samplers draw: the images' initial noise, then ever more fresh noise."""
    shape = like.shape[1:]
    yield initial_noise(seed, indices, shape, sigma_data).to(like)
    fresh = SampleGenerator(seed, indices, Purpose.FRESH_NOISE)
    while True:
        yield sigma_data * fresh.normal(shape).to(like)
