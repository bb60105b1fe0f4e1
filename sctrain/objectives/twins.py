"""The discrete twins of sCT and sCD (sCM appendix E): a difference of two times s < t takes the tangent's place.

    x_s   = cos(t - s) x_t - sin(t - s) dx_t/dt
    Delta = -cos s (sigma_d F-(x_t, t) - dx/dt)
            - r sin s ( x_t + sigma_d [cos(t - s) F-(x_t, t) - F-(x_s, s)] / sin(t - s) )

At r = 1 this is (f(x_t, t) - f(x_s, s)) / sin(t - s), which tends to df/dt as s tends to t; g = cos t Delta.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sctrain.objectives.base import Draws, Networks, Progress
from sctrain.objectives.continuous import Evaluation, SimplifiedConsistency
from sctrain.objectives.levels import FromData, LognormalPairs
from sctrain.processes import diffuse, jump, per_sample, time_of
from sctrain.randomness import SampleGenerator


def difference(
    x_t: Tensor, dx_dt: Tensor, F: Tensor, F_s: Tensor, t: Tensor, s: Tensor, r: float, sigma_data: float
) -> Tensor:
    """Delta, which takes the place of df/dt: (B, C, H, W), from F at (x_t, t) and F_s at (x_s, s)."""
    gap, s = per_sample(t - s, x_t), per_sample(s, x_t)
    slope = (gap.cos() * F - F_s) / gap.sin()
    return -s.cos() * (sigma_data * F - dx_dt) - r * s.sin() * (x_t + sigma_data * slope)


@dataclass(frozen=True)
class DiscreteTwin(SimplifiedConsistency):
    """`sct_discrete` where there is no teacher, `scd_discrete` where there is one."""

    grid: FromData = field(default_factory=FromData)
    levels: int = 1024  # N

    def times(self, generator: SampleGenerator, progress: Progress) -> tuple[Tensor, Tensor | None]:
        """t_i of i = 1 .. N and t_(i-1): ln sigma ~ N(mean, std^2), split over the cells of the grid."""
        pairs = LognormalPairs(self.grid, self.levels, None, self.time_mean, self.time_std)
        t, s = (time_of(sigma, self.sigma_data).float() for sigma in pairs.draw(generator, progress.done))
        return t, s

    def evaluate(self, draws: Draws, networks: Networks) -> Evaluation:
        t, s = draws.t, draws.s
        assert s is not None, "drawn in pairs"
        x_t, sigma_data = diffuse(draws.x0, draws.z, t), self.sigma_data
        u = x_t / sigma_data
        dx_dt = self.flow_velocity(draws, u, networks)
        x_s = jump(x_t, dx_dt / sigma_data, t, s, sigma_data)
        at, before = (u, t, *draws.conditions), (x_s / sigma_data, s, *draws.conditions)
        (F, log_weight), F_s = networks.pair(at, before)
        cos, sin = per_sample(t.cos(), F), per_sample(t.sin(), F)
        g = cos * difference(x_t, dx_dt, F.detach(), F_s, t, s, draws.r, sigma_data)
        return Evaluation(F, log_weight, g, cos * sin * (F.detach() - F_s) / per_sample((t - s).sin(), F))
