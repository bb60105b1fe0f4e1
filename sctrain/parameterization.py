"""What a network is told of the noise, and where its consistency function starts.

Objectives and samplers see every network as TrigFlow's F(u, t), u = x_t / sigma_d, with the consistency function
f = cos t x_t - sin t sigma_d F. Papers that tell the network another function of the noise, or demand f = x at a
smallest noise level instead of at t = 0, differ from that by a linear change of F, which is made here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from sctrain.processes import per_sample, sigma_of

# (F, w) of a network at (u, t, labels, ...): (B, C, H, W), (B,), (B,) -> (B, C, H, W), (B,)
Network = Callable[..., tuple[Tensor, Tensor]]
NoiseInput = Literal["t", "log_sigma"]
_LEAST_SIGMA = 1e-30


@dataclass(frozen=True)
class Parameterization:
    """How the output of a module becomes F; the default changes nothing."""

    sigma_data: float
    noise_input: NoiseInput = "t"  # t in radians (sCM section 4.1), or EDM's c_noise = ln(sigma) / 4
    sigma_min: float = 0.0  # the level at which f is the identity (CM 2023 appendix C)

    def of(self, module: Network) -> Network:
        """F of `module` in TrigFlow's variables; `module` itself where that is what it computes."""
        if self.noise_input == "t" and not self.sigma_min:
            return module

        def network(u: Tensor, t: Tensor, *conditions: Any) -> tuple[Tensor, Tensor]:
            sigma = sigma_of(t, self.sigma_data)
            F, log_weight = module(u, t if self.noise_input == "t" else _c_noise(sigma), *conditions)
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


def _c_noise(sigma: Tensor) -> Tensor:
    """EDM's ln(sigma) / 4; finite at sigma = 0, where sin t = 0 takes the output out of f, but not if it is nan."""
    return sigma.clamp_min(_LEAST_SIGMA).log() / 4
