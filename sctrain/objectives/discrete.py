"""Discrete consistency: f at two neighbouring times of a trajectory must agree (CM 2023, iCT, ECT, LCM).

    L = lambda(sigma_t, sigma_s) d( f_theta(x_t, t), f_theta-(x_s, s) )

The methods differ in how the pair of times is drawn, in how x_s follows from x_t (by a teacher's step, or by the same
noise), in the metric d, in the weight lambda, and in the target theta-.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sctrain.objectives.base import Batch, Draws, Loss, Networks, Progress
from sctrain.objectives.drawing import Data, is_finite, kept, l2_norm
from sctrain.objectives.levels import Pairs
from sctrain.objectives.metrics import Metric
from sctrain.processes import denoise, diffuse, sigma_of, time_of
from sctrain.randomness import SampleGenerator
from sctrain.solvers import ode_step

Weight = Callable[[Tensor, Tensor], Tensor]


def even(sigma_t: Tensor, sigma_s: Tensor) -> Tensor:
    """The weight 1 (CM 2023)."""
    return torch.ones_like(sigma_t)


def inverse_gap(sigma_t: Tensor, sigma_s: Tensor) -> Tensor:
    """The weight 1 / (sigma_t - sigma_s) (iCT section 3.3, ECT)."""
    return 1 / (sigma_t - sigma_s)


@dataclass(frozen=True)
class EdmWeight:
    """The weight (sigma_t^2 + sigma_d^2) / (sigma_t sigma_d)^2 = 1 / c_out^2 (ECT on ImageNet)."""

    sigma_data: float

    def __call__(self, sigma_t: Tensor, sigma_s: Tensor) -> Tensor:
        return (sigma_t**2 + self.sigma_data**2) / (sigma_t * self.sigma_data) ** 2


@dataclass(frozen=True)
class DiscreteConsistency(Data):
    """CD, CT, iCT, ECT, LCM and LCF, by their parts."""

    label_dropout: float
    pairs: Pairs
    neighbour: Literal["noise", "euler", "heun"]
    metric: Metric
    weight: Weight
    keep: Callable[[float], float] | None = None  # of the target, by the part of the budget that is done
    guidance: tuple[float, float] | None = None  # the scale is drawn uniformly from this interval

    def draw(self, generator: SampleGenerator, batch: Batch, progress: Progress) -> Draws:
        """Two times, one noise, the label, and the scale of guidance where there is one."""
        levels = self.pairs.draw(generator, progress.done)
        t, s = (time_of(sigma, self.sigma_data).to(batch.x0.dtype) for sigma in levels)
        z, labels = self.noise(generator, batch), self.labels(generator, batch, self.label_dropout)
        return Draws(batch.x0, z, t, labels, guidance=self.scale(generator, self.guidance), s=s)

    def loss(self, draws: Draws, networks: Networks) -> Loss:
        x_t, t, s = diffuse(draws.x0, draws.z, draws.t), draws.t, draws.s
        assert s is not None, "drawn in pairs"
        x_s = self.at_neighbour(draws, x_t, networks)
        inputs = ((x / self.sigma_data, time, *draws.conditions) for x, time in ((x_t, t), (x_s, s)))
        (F_t, _), F_s = networks.pair(*inputs)
        f_t, f_s = denoise(x_t, F_t, t, self.sigma_data), denoise(x_s, F_s, s, self.sigma_data)
        sound = is_finite(f_t) & is_finite(f_s)
        distance = self.metric(kept(f_t, sound), kept(f_s, sound))
        weight = self.weight(*(sigma_of(time.double(), self.sigma_data) for time in (t, s))).to(distance.dtype)
        gap = l2_norm(f_t.detach() - f_s) / l2_norm(x_t - x_s).clamp_min(torch.finfo(x_t.dtype).tiny)
        return Loss((weight * distance).where(sound, 0), {"distance": distance.detach(), "slope": gap}, dropped=~sound)

    def at_neighbour(self, draws: Draws, x_t: Tensor, networks: Networks) -> Tensor:
        """x_s: on the teacher's trajectory through x_t, or cos s x0 + sin s z of this very sample."""
        assert draws.s is not None
        if self.neighbour == "noise":
            return diffuse(draws.x0, draws.z, draws.s)
        teacher = self.teacher(draws, networks)
        with torch.no_grad():
            return ode_step(teacher, x_t, draws.t, draws.s, (draws.labels,), self.sigma_data, self.neighbour)

    def target_keep(self, before: Progress, after: Progress) -> float | None:
        return None if self.keep is None else self.keep(before.done)
