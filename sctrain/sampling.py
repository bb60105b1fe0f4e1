"""Samplers as free functions of one signature: (network, noise, labels, sigma_data, ...) -> images in model space.

Noise is keyed by (seed, index of the image), so images do not depend on how a batch is split.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sctrain.objectives.base import Network
from sctrain.processes import T_MAX, denoise
from sctrain.randomness import Purpose, SampleGenerator


def initial_noise(seed: int, indices: Tensor, shape: Sequence[int], sigma_data: float) -> Tensor:
    """Z ~ N(0, sigma_d^2 I) of images number `indices` (B,): (B, *shape)."""
    return sigma_data * SampleGenerator(seed, indices, Purpose.INITIAL_NOISE).normal(shape)


def step_times(steps: int, middle_time: float = 1.1) -> list[float]:
    """Times of a `steps`-step consistency sampler, descending from T_MAX.

    One: T_MAX. Two: T_MAX and `middle_time` (sCM appendix G). More: the rest divides [0, `middle_time`] evenly.
    """
    return [T_MAX, *(middle_time * (1 - i / (steps - 1)) for i in range(steps - 1))]


@torch.no_grad()
def consistency_sample(
    network: Network,
    noise: Tensor,
    labels: Tensor,
    sigma_data: float,
    times: Sequence[float],
    seed: int,
    indices: Tensor,
) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1), one network evaluation per time."""
    fresh = SampleGenerator(seed, indices, Purpose.FRESH_NOISE)
    x = noise
    for i, time in enumerate(times):
        if i > 0:
            x = math.cos(time) * x + math.sin(time) * sigma_data * fresh.normal(x.shape[1:]).to(x)
        t = torch.full((len(x),), time, dtype=x.dtype, device=x.device)
        x = denoise(x, network(x / sigma_data, t, labels)[0], t, sigma_data)
    return x


def karras_times(steps: int, sigma_data: float, sigma_min: float = 0.002, rho: float = 7.0) -> list[float]:
    """`steps` + 1 times from T_MAX to 0: EDM's noise levels (Karras et al. 2022, eq. 5), t = arctan(sigma/sigma_d)."""
    low, high = sigma_min ** (1 / rho), (sigma_data * math.tan(T_MAX)) ** (1 / rho)
    sigmas = [(high + i / max(steps - 1, 1) * (low - high)) ** rho for i in range(steps)]
    return [*(math.atan(sigma / sigma_data) for sigma in sigmas), 0.0]


@torch.no_grad()
def ode_sample(
    network: Network,
    noise: Tensor,
    labels: Tensor,
    sigma_data: float,
    steps: int,
    solver: Literal["euler", "heun"] = "heun",
) -> Tensor:
    """Solve the probability-flow ODE dx/dt = sigma_d F(x / sigma_d, t) from T_MAX to 0.

    Euler is DDIM, x_s = cos(t - s) x - sin(t - s) sigma_d F (sCM section 3): `steps` evaluations. Heun is EDM's
    (Karras et al. 2022, algorithm 1): the mean of the noise estimates at both ends, the last step excepted: 2 steps -
    1 evaluations.
    """
    x, times = noise, karras_times(steps, sigma_data)
    for now, then in zip(times[:-1], times[1:], strict=True):
        z = _noise_estimate(network, x, now, labels, sigma_data)
        proposed = _move(x, z, now, then)
        if solver == "heun" and then > 0:
            z_then = _noise_estimate(network, proposed, then, labels, sigma_data)
            proposed = _move(x, 0.5 * (z + z_then), now, then)
        x = proposed
    return x


def _noise_estimate(network: Network, x: Tensor, time: float, labels: Tensor, sigma_data: float) -> Tensor:
    """Z = sin t x + cos t sigma_d F."""
    t = torch.full((len(x),), time, dtype=x.dtype, device=x.device)
    return math.sin(time) * x + math.cos(time) * sigma_data * network(x / sigma_data, t, labels)[0]


def _move(x: Tensor, z: Tensor, now: float, then: float) -> Tensor:
    """The state at time `then` on the straight line of noise estimate z: x / cos t changes by (tan s - tan t) z."""
    return (math.cos(then) * x - math.sin(now - then) * z) / math.cos(now)
