"""Consistency functions of Gaussian data in closed form, the objectives that know them, and wrong tangents."""

from dataclasses import dataclass, replace

import torch
from gaussian import Gaussian
from test_objectives import B, consistency, some_draws
from torch import Tensor

from models.tangent.engines import single_pass
from sctrain.objectives.base import Batch, Draws, Progress
from sctrain.objectives.early import EarlyContinuous
from sctrain.objectives.levels import FromData, Grid
from sctrain.objectives.twins import DiscreteTwin
from sctrain.processes import T_MAX, per_sample, sigma_of
from sctrain.randomness import Purpose, SampleGenerator

GRID = Grid(0.02, 80.0, 7.0)  # a sigma_min that shows
SEGMENTS = 4


@dataclass(frozen=True)
class Exact:
    """The consistency functions of Gaussian data, as the F that a network would have to be."""

    gaussian: Gaussian

    def flow(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Where the probability-flow ODE takes x from t to s."""
        t, s = per_sample(t, x), per_sample(s, x)
        scale = (self.gaussian.variance(s) / self.gaussian.variance(t)).sqrt()
        return s.cos() * self.gaussian.mean + (x - t.cos() * self.gaussian.mean) * scale

    def to_the_end(self, u, t, labels, guidance, end):
        """F whose jump from t to `end` is the flow."""
        x, gap = self.gaussian.sigma_data * u, per_sample(t - end, u)
        F = (gap.cos() * x - self.flow(x, t, end)) / (gap.sin() * self.gaussian.sigma_data)
        return F, torch.zeros_like(t)

    def anchored(self, u, t, labels):
        """A module's F, of which `Parameterization` makes the flow to sigma_min in EDM's variables."""
        x, sigma_data, least = self.gaussian.sigma_data * u, self.gaussian.sigma_data, GRID.sigma_min
        start = torch.full_like(t, least / sigma_data).atan()
        t4, sigma = per_sample(t, u), per_sample(sigma_of(t, sigma_data), u)
        f = self.flow(x, t, start) / per_sample(start, u).cos()
        F = (t4.cos() * x - f) / (t4.sin() * sigma_data)
        skip = sigma_data * least / sigma * (2 * sigma - least) / ((sigma - least) ** 2 + sigma_data**2)
        return (F + skip * u) / (1 - least / sigma), torch.zeros_like(t)


def early(distill: bool, sigma_data: float = 0.5, full: bool = False) -> EarlyContinuous:
    return EarlyContinuous(sigma_data, 10, 0.0, distill=distill, grid=GRID, full=full)


def twin(distill: bool, sigma_data: float = 0.5, levels: int = 16) -> DiscreteTwin:
    common = {key: value for key, value in vars(consistency(sigma_data, distill)).items() if key != "segments"}
    return DiscreteTwin(**common, grid=FromData(GRID.sigma_min, GRID.sigma_max, GRID.rho), levels=levels)


def gaussian_draws(gaussian: Gaussian, s: float | Tensor | None = None, r: float = 1.0) -> Draws:
    """Times well inside, and s a given gap below them, or at lower ends of segments."""
    draws = some_draws(gaussian.sigma_data, r, shape=gaussian.mean.shape)
    if isinstance(s, float):
        s = draws.t - s
    return replace(draws, x0=gaussian.sample(B, torch.Generator().manual_seed(1)), s=s)


def lower_ends(t: Tensor) -> Tensor:
    width = T_MAX / SEGMENTS
    return (t / width).floor().clamp(max=SEGMENTS - 1) * width


def flipped(*arguments):
    outputs, t_F = single_pass(*arguments)
    return outputs, -t_F


def without_sigma_data(*arguments):
    outputs, t_F = single_pass(*arguments)
    return outputs, t_F / 0.5


def drawn(objective, count: int = 4000) -> Draws:
    batch = Batch(torch.zeros(count, 1, 1, 1), torch.zeros(count, dtype=torch.long))
    return objective.draw(SampleGenerator(5, range(count), Purpose.TRAINING), batch, Progress(0, 1))
