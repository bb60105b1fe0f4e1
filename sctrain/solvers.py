"""One step of a solver of the probability-flow ODE dx/dt = sigma_d F(x / sigma_d, t), from times t to s per sample."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sctrain.parameterization import Network
from sctrain.processes import jump, noise_estimate, per_sample

Solver = Literal["euler", "heun"]


def ode_step(
    network: Network,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    conditions: tuple[Any, ...],
    sigma_data: float,
    solver: Solver = "heun",
) -> Tensor:
    """x_s (B, C, H, W) from x at time t (B,), s <= t (B,).

    Euler's step in sigma is DDIM (sCM section 3). Heun's takes the mean of the slopes, which are the noise estimates,
    at both ends (Karras et al. 2022, algorithm 1); where s is 0 it is Euler's, as there.
    """
    F, _ = network(x / sigma_data, t, *conditions)
    proposed = jump(x, F, t, s, sigma_data)
    if solver == "euler":
        return proposed
    F_s, _ = network(proposed / sigma_data, s, *conditions)
    z = 0.5 * (noise_estimate(x, F, t, sigma_data) + noise_estimate(proposed, F_s, s, sigma_data))
    return torch.where(per_sample(s, x) > 0, along(x, z, t, s), proposed)


def along(x: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The state at s on the straight line of noise z in EDM's variables: x / cos t changes by (tan s - tan t) z."""
    t, s = per_sample(t, x), per_sample(s, x)
    return (s.cos() * x - (t - s).sin() * z) / t.cos()
