"""Which two noise levels sigma_s < sigma_t a discrete consistency method compares: grids, curricula and mappings.

Everything is a function of the part of the budget that is done, in [0, 1]; images take the place of the papers'
iterations k of K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from sctrain.config.objectives import OnGrid
from sctrain.randomness import SampleGenerator


@dataclass(frozen=True)
class Grid:
    """EDM's noise levels (Karras et al. 2022, eq. 5), ascending as in the consistency papers."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    @classmethod
    def of(cls, method: OnGrid) -> Self:
        """The grid that a configuration describes."""
        return cls(method.sigma_min, method.sigma_max, method.rho)

    def levels(self, count: int) -> Tensor:
        """sigma_1 = sigma_min < ... < sigma_N = sigma_max: (N,) float64, N >= 2."""
        return torch.linspace(*self._ends, count, dtype=torch.float64) ** self.rho

    def at(self, u: Tensor) -> Tensor:
        """tau(u), the level at the part u in [0, 1] of the way: the grid of infinitely many levels."""
        low, high = self._ends
        return (low + (high - low) * u) ** self.rho

    def slope(self, sigma: Tensor) -> Tensor:
        """tau'(u) where tau(u) = sigma."""
        low, high = self._ends
        return self.rho * (high - low) * sigma ** (1 - 1 / self.rho)

    @property
    def _ends(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)


@dataclass(frozen=True)
class FromData(Grid):
    """EDM's noise levels and the clean image below them: sigma_0 = 0 < sigma_1 < ... < sigma_N."""

    def levels(self, count: int) -> Tensor:
        """sigma_0 .. sigma_N: (N + 1,) float64, N + 1 = `count` >= 3."""
        return torch.cat([torch.zeros(1, dtype=torch.float64), super().levels(count - 1)])


def ct_levels(done: float, first: int, last: int) -> int:
    """N(k) = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 (CM 2023 appendix C)."""
    square = done * ((last + 1) ** 2 - first**2) + first**2
    return math.ceil(math.sqrt(square) - 1 - 1e-9) + 1  # an exact root may come out a hair too large


def ct_decay(levels: int, first: int, first_decay: float) -> float:
    """mu(k) = exp(s0 ln mu0 / N(k)) (CM 2023 appendix C; the released code divides by N(k) - 1)."""
    return math.exp(first * math.log(first_decay) / levels) if first_decay else 0.0


def ict_levels(done: float, first: int, last: int) -> int:
    """N(k) = min(s0 2^floor(k/K'), s1) + 1, K' = K / (log2 floor(s1/s0) + 1) (iCT section 3.4)."""
    stages = math.log2(last // first) + 1  # not an integer unless s1/s0 is a power of two; s1 is reached all the same
    return min(first * 2 ** math.floor(done * stages + 1e-9), last) + 1


def ect_stage(done: float, stages: int) -> int:
    """a = 0, 1, ..., stages - 1 in equal parts of the budget (ECT)."""
    return min(math.floor(done * stages + 1e-9), stages - 1)


def ect_mapping(sigma: Tensor, stage: int, q: float, k: float, b: float) -> Tensor:
    """r(t) = max(t (1 - n(t) / q^(a + 1)), 0), n(t) = 1 + k sigmoid(-b t); 0 is the clean image (ECT)."""
    n = 1 + k * torch.sigmoid(-b * sigma)
    return (sigma * (1 - n / q ** (stage + 1))).clamp_min(0)


def lognormal_cells(sigmas: Tensor, mean: float, std: float) -> Tensor:
    """p(sigma_i) ~ erf((ln sigma_i+1 - mean) / (sqrt 2 std)) - erf((ln sigma_i - mean) / ..): (N - 1,) (iCT eq. 10)."""
    edges = torch.erf((sigmas.log() - mean) / (math.sqrt(2) * std))
    weights = edges.diff()
    return weights / weights.sum()


class Pairs(Protocol):
    """Draws the two levels of every sample of a batch."""

    def draw(self, generator: SampleGenerator, done: float) -> tuple[Tensor, Tensor]:
        """sigma_t > sigma_s >= 0, float64 (B,) each."""
        ...


@dataclass(frozen=True)
class UniformPairs:
    """Neighbours on the grid, n ~ U{1 .. N-1} (CM 2023 algorithms 2 and 3); `last` None: N stays at `first`."""

    grid: Grid
    first: int
    last: int | None = None

    def count(self, done: float) -> int:
        """N."""
        return self.first if self.last is None else ct_levels(done, self.first, self.last)

    def draw(self, generator: SampleGenerator, done: float) -> tuple[Tensor, Tensor]:
        return _neighbours(self.grid.levels(self.count(done)), None, generator)


@dataclass(frozen=True)
class LognormalPairs:
    """Neighbours on the grid with iCT's p(sigma_i) and doubling curriculum; `last` None: N stays at `first` + 1."""

    grid: Grid
    first: int
    last: int | None
    mean: float
    std: float

    def count(self, done: float) -> int:
        """N."""
        return self.first + 1 if self.last is None else ict_levels(done, self.first, self.last)

    def draw(self, generator: SampleGenerator, done: float) -> tuple[Tensor, Tensor]:
        sigmas = self.grid.levels(self.count(done))
        return _neighbours(sigmas, lognormal_cells(sigmas, self.mean, self.std), generator)


@dataclass(frozen=True)
class MappedPairs:
    """ln sigma_t ~ N(mean, std^2), at most `sigma_max`, and sigma_s = r(sigma_t) of the present stage (ECT).

    No sampler starts beyond T_MAX, and close to pi/2 float32 angles no longer tell two levels apart.
    """

    mean: float
    std: float
    stages: int
    q: float
    k: float
    b: float
    sigma_max: float = math.inf

    def draw(self, generator: SampleGenerator, done: float) -> tuple[Tensor, Tensor]:
        sigma = (self.mean + self.std * generator.normal().double()).exp().clamp(max=self.sigma_max)
        return sigma, ect_mapping(sigma, ect_stage(done, self.stages), self.q, self.k, self.b)


DDPM_STEPS = 1000


def ddim_times(steps: int) -> Tensor:
    """0, the clean image, and the angles t = arccos(alpha) at `steps` even ones of Stable Diffusion's 1000 steps.

    beta is linear in its root from 0.00085 to 0.012; the steps are 1000/steps - 1, ..., 999 as in LCM: (steps + 1,).
    The paper's code ends at step 0, t = 0.029, where its consistency function is the identity. Ours is that at t = 0: a
    target at 0.029 would be the network's own guess, tied to nothing.
    """
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, DDPM_STEPS, dtype=torch.float64) ** 2
    alpha = (1 - beta).cumprod(0).sqrt()
    chosen = torch.arange(1, steps + 1) * DDPM_STEPS // steps - 1
    return torch.cat([alpha.new_ones(1), alpha[chosen]]).acos()


@dataclass(frozen=True)
class DdimPairs:
    """A step of DDIM among `steps`, which skips 1000 / steps of the process (LCM section 4.3)."""

    sigma_data: float
    steps: int

    def draw(self, generator: SampleGenerator, done: float) -> tuple[Tensor, Tensor]:
        return _neighbours(self.sigma_data * ddim_times(self.steps).tan(), None, generator)


def _neighbours(sigmas: Tensor, weights: Tensor | None, generator: SampleGenerator) -> tuple[Tensor, Tensor]:
    """A random pair of neighbours per sample; None draws them evenly."""
    uniform = generator.uniform()
    cells = len(sigmas) - 1
    if weights is None:
        index = (uniform * cells).long()
    else:
        index = torch.searchsorted(weights.cumsum(0).float().to(uniform.device), uniform, right=True)
    index = index.clamp(max=cells - 1)
    sigmas = sigmas.to(uniform.device)
    return sigmas[index + 1], sigmas[index]
