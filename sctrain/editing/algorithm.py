"""Zero-shot editing in TrigFlow variables: CM 2023 algorithm 4, SDEdit's strokes, denoising and interpolation.

N(x, t^2) of the paper's noise levels is cos t x + sin t z here. Like the samplers these are free functions, and noise
is keyed by (seed, index of the image), so a picture does not depend on how a batch is split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sctrain.editing.measurements import Measurement
from sctrain.parameterization import Network
from sctrain.processes import denoise
from sctrain.sampling import consistency_sample, initial_noise, noised

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

    x = _with_first_noise(measurement.projected(y), sigma_data, times[0], seed, indices)
    return consistency_sample(network, x, (labels,), sigma_data, times, seed, indices, anchor, known_again)


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
    x = _with_first_noise(strokes, sigma_data, times[0], seed, indices)
    return consistency_sample(network, x, (labels,), sigma_data, times, seed, indices, anchor)


@torch.no_grad()
def interpolated(
    network: Network, first: Tensor, second: Tensor, share: Tensor, labels: Tensor, sigma_data: float, time: float
) -> Tensor:
    """Images of the noises at `share` (N,) of the way between two, `first` and `second` (C, H, W): (N, C, H, W).

    The noises are states at `time`, where the process ends that the network was trained on.
    """
    z = slerp(first, second, share)
    return _consistency(network, z, torch.full((len(z),), time).to(z), labels, sigma_data)


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


def _with_first_noise(x0: Tensor, sigma_data: float, time: float, seed: int, indices: Tensor) -> Tensor:
    """The state at `time` of images `x0` and the noise that samplers start from: (B, C, H, W)."""
    z = initial_noise(seed, indices, x0.shape[1:], sigma_data).to(x0)
    return noised(x0, z, time, sigma_data)


def _consistency(network: Network, x: Tensor, t: Tensor, labels: Tensor, sigma_data: float) -> Tensor:
    return denoise(x, network(x / sigma_data, t, labels)[0], t, sigma_data)
