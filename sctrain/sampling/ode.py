"""Solvers of a diffusion model's probability-flow ODE dx/dt = sigma_d F(x / sigma_d, t), in two sets of variables.

The mathematics is in TrigFlow's (x_t, t). EDM's (x_sigma, sigma) are x_t / cos t and sigma_d tan t, and a denoiser D
is another way to write F; `edm_sample` converts, solves, and converts back.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from sctrain.parameterization import Network
from sctrain.processes import denoise, jump, per_sample, sigma_of, time_at
from sctrain.sampling.times import karras_times
from sctrain.solvers import ode_step

OdeSolver = Literal["euler", "heun", "dpm"]
# D of EDM: (x_sigma, sigma, *conditions), (B, C, H, W) and (B,), -> E[x0 | x_sigma] (B, C, H, W).
Denoiser = Callable[..., Tensor]


@torch.no_grad()
def ode_sample(
    network: Network,
    noise: Tensor,
    conditions: tuple[Any, ...],
    sigma_data: float,
    steps: int,
    solver: OdeSolver = "heun",
    times: Sequence[float] | None = None,
) -> Tensor:
    """The state at the last of `times` of the trajectory through `noise` at the first; by default T_MAX to 0.

    Without `times` they are EDM's `steps` noise levels and 0. Network evaluations per image: `euler`, which is DDIM
    (sCM section 3), and `dpm`, DPM-Solver++(2M) (Lu et al. 2022), `steps`; `heun` (Karras et al. 2022, algorithm 1)
    2 steps - 1, since a step to 0 is Euler's.
    """
    times = karras_times(steps, sigma_data) if times is None else times
    if solver == "dpm":
        return _dpm_solver(network, noise, conditions, sigma_data, times)
    x = noise
    for time, goal in pairwise(times):
        t, s = (x.new_full((len(x),), value) for value in (time, goal))
        x = ode_step(network, x, t, s, conditions, sigma_data, solver if goal > 0 else "euler")
    return x


def _dpm_solver(
    network: Network, x: Tensor, conditions: tuple[Any, ...], sigma_data: float, times: Sequence[float]
) -> Tensor:
    """DPM-Solver++(2M): a step of DDIM with the denoised image extrapolated from the last two, linearly in ln sigma.

    With D at t, D' at the time before it, and r the last step in ln sigma over this one,

        x_s = cos(t - s) x_t - sin(t - s) sigma_d F + sin(t - s) / (2 r sin t) (D - D').

    The first step has no D' yet, and the step to s = 0 is infinitely long: both are DDIM's.
    """
    before: Tensor | None = None
    last_step = 0.0
    for time, goal in pairwise(times):
        t, s = (x.new_full((len(x),), value) for value in (time, goal))
        F, _ = network(x / sigma_data, t, *conditions)
        denoised = denoise(x, F, t, sigma_data)
        x = jump(x, F, t, s, sigma_data)
        if goal > 0:
            step = math.log(math.tan(time) / math.tan(goal))
            if before is not None:
                x = x + math.sin(time - goal) / (2 * last_step / step * math.sin(time)) * (denoised - before)
            before, last_step = denoised, step
    return x


def trigflow_network(denoiser: Denoiser, sigma_data: float) -> Network:
    """F = (cos t x_t - D(x_t / cos t; sigma_d tan t)) / (sigma_d sin t) of EDM's denoiser; its log-weight is 0."""

    def network(u: Tensor, t: Tensor, *conditions: Any) -> tuple[Tensor, Tensor]:
        x, cos, sin = sigma_data * u, per_sample(t.cos(), u), per_sample(t.sin(), u)
        D = denoiser(x / cos, sigma_of(t, sigma_data), *conditions)
        return (cos * x - D) / (sigma_data * sin), torch.zeros_like(t)

    return network


def edm_sample(
    denoiser: Denoiser,
    x: Tensor,
    conditions: tuple[Any, ...],
    sigma_data: float,
    sigmas: Sequence[float],
    solver: OdeSolver = "heun",
) -> Tensor:
    """The same solvers in EDM's variables: from x at noise level `sigmas[0]` to that at the last of `sigmas`.

    dx/dsigma = (x - D(x; sigma)) / sigma (Karras et al. 2022, eq. 3).
    """
    times = [time_at(sigma, sigma_data) for sigma in sigmas]
    network = trigflow_network(denoiser, sigma_data)
    end = ode_sample(network, math.cos(times[0]) * x, conditions, sigma_data, len(times) - 1, solver, times)
    return end / math.cos(times[-1])
