"""What a network is told of the noise, and where its consistency function starts.

Objectives and samplers see every network as TrigFlow's F(u, t), u = x_t / sigma_d, with the consistency function
f = cos t x_t - sin t sigma_d F. Papers that tell the network another function of the noise, or demand f = x at a
smallest noise level instead of at t = 0, differ from that by a linear change of F, which is made here and nowhere else.
So do networks that say which noise is in their input. v-prediction is F itself: v = alpha eps - sigma x0 with alpha =
cos t, sigma = sin t (Salimans & Ho 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sctrain.processes import per_sample, sigma_of

# (F, w) of a network at (u, t, labels, ...): (B, C, H, W), (B,), (B,) -> (B, C, H, W), (B,)
Network = Callable[..., tuple[Tensor, Tensor]]
NoiseInput = Literal["t", "log_sigma", "vp", "ddpm"]
NetworkOutput = Literal["velocity", "noise"]
SMOOTH: tuple[NoiseInput, ...] = ("t", "log_sigma")  # inputs along which a network can be differentiated
VP_BETA_MIN, VP_BETA_RISE, VP_STEPS = 0.1, 19.9, 1000
DDPM_BETAS = (1e-4, 0.02)  # the first and the last of the 1000
_LEAST = 1e-37  # a noise level whose logarithm is finite: at the clean image f is the identity, whatever F says


@dataclass(frozen=True)
class Parameterization:
    """How the output of a module becomes F; the default changes nothing."""

    sigma_data: float
    noise_input: NoiseInput = "t"
    sigma_min: float = 0.0  # the level at which f is the identity (CM 2023 appendix C)
    output: NetworkOutput = "velocity"

    def of(self, module: Network) -> Network:
        """F of `module` in TrigFlow's variables; `module` itself where that is what it computes."""
        if self.noise_input == "t" and self.output == "velocity" and not self.sigma_min:
            return module

        def network(u: Tensor, t: Tensor, *conditions: Any) -> tuple[Tensor, Tensor]:
            sigma = sigma_of(t, self.sigma_data)
            found, log_weight = module(u, told_noise(self.noise_input, t, sigma), *conditions)
            F = found if self.output == "velocity" else velocity_of_noise(found, u, t)
            return self._anchored(F, u, sigma), log_weight

        return network

    def _anchored(self, F: Tensor, u: Tensor, sigma: Tensor) -> Tensor:
        """The F' whose f is c_skip x + c_out F with CM 2023's coefficients.

        With x = x_t / cos t, c_skip = sigma_d^2 / ((sigma - e)^2 + sigma_d^2), c_out = sigma_d (sigma - e) /
        sqrt(sigma^2 + sigma_d^2), e = sigma_min and EDM's network being -F,

            F' = (1 - e / sigma) F - (sigma_d e / sigma) (2 sigma - e) / ((sigma - e)^2 + sigma_d^2) u.
        """
        e = self.sigma_min
        if not e:
            return F
        skip = self.sigma_data * e / sigma * (2 * sigma - e) / ((sigma - e) ** 2 + self.sigma_data**2)
        return per_sample(1 - e / sigma, F) * F - per_sample(skip, u) * u


def told_noise(kind: NoiseInput, t: Tensor, sigma: Tensor) -> Tensor:
    """What a network is told at the time t (B,), radians, where the noise level is sigma (B,).

    t: itself (sCM section 4.1). log_sigma: EDM's c_noise = ln(sigma) / 4. vp: 999 times the time of the VP process, in
    which ln(1 + sigma^2) = beta_d s^2 / 2 + beta_min s (Song et al. 2021, as in EDM table 1). ddpm: the step, 0 to 999,
    of DDPM's linear betas, between two steps in proportion to ln sigma (Ho et al. 2020).
    """
    match kind:
        case "t":
            return t
        case "log_sigma":
            return sigma.clamp_min(_LEAST).log() / 4
        case "vp":
            energy = 2 * VP_BETA_RISE * (sigma * sigma).log1p()
            return (VP_STEPS - 1) * ((VP_BETA_MIN**2 + energy).sqrt() - VP_BETA_MIN) / VP_BETA_RISE
        case "ddpm":
            return _ddpm_step(sigma)


def _ddpm_step(sigma: Tensor) -> Tensor:
    """(B,) -> (B,), clipped to the steps that there are."""
    wanted, levels = sigma.clamp_min(_LEAST).log(), ddpm_levels(sigma.device).log()
    wide = wanted.to(levels.dtype)
    above = torch.searchsorted(levels, wide).clamp(1, len(levels) - 1)
    share = (wide - levels[above - 1]) / (levels[above] - levels[above - 1])
    return (above - 1 + share).clamp(0, len(levels) - 1).to(sigma.dtype)


def ddpm_levels(device: torch.device | None = None) -> Tensor:
    """sigma of DDPM's 1000 steps, float64 (1000,): sqrt((1 - a) / a) with a the product of 1 - beta."""
    betas = torch.linspace(*DDPM_BETAS, VP_STEPS, dtype=torch.float64, device=device)
    kept = (1 - betas).cumprod(0)
    return ((1 - kept) / kept).sqrt()


def velocity_of_noise(noise: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """F of a network that says which noise is in u: u = cos t x0 + sin t n gives cos t n - sin t x0.

    = (n - sin t u) / cos t, all of unit size; it cancels towards t = pi/2, where such networks end.
    """
    return (noise - per_sample(t.sin(), u) * u) / per_sample(t.cos(), u)
