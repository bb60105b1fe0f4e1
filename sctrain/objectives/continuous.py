"""Continuous-time consistency: sCT from data alone, sCD from a teacher (sCM algorithm 1), in one segment or several.

The consistency function f = cos t x_t - sin t sigma_d F must be constant along a trajectory: df/dt = 0. With F- = sg F,

    cos t df/dt = -cos^2 t (sigma_d F- - dx/dt) - (cos t sin t x_t + sigma_d cos t sin t dF-/dt)         (sCM eq. 7, 8)

is the tangent g; training moves F along g / (||g|| + c). `r` warms the second, unstable part up.

In M segments with ends 0 = t_0 < ... < t_M the function goes not to 0 but to the lower end t_k of the segment of t,
which the network is told (multistep consistency, Heek et al. 2024). The formulas hold with delta = t - t_k for t.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sctrain.objectives.base import Batch, Draws, Loss, Networks, Progress
from sctrain.objectives.diffusion import weighted
from sctrain.objectives.drawing import TrigFlowDraws, is_finite, kept, l2_norm, mean_square, rms_factor
from sctrain.objectives.flow import FollowsFlow, Trajectory
from sctrain.processes import T_MAX, diffuse, per_sample
from sctrain.randomness import SampleGenerator


def consistency_tangent(
    x_t: Tensor, dx_dt: Tensor, F: Tensor, t_F: Tensor, t: Tensor, r: float, sigma_data: float
) -> Tensor:
    """g = -cos^2 t (sigma_d F - dx/dt) - r (cos t sin t x_t + sigma_d t_F); t_F = cos t sin t dF/dt (sCM eq. 8)."""
    cos, sin = per_sample(t.cos(), x_t), per_sample(t.sin(), x_t)
    return -(cos**2) * (sigma_data * F - dx_dt) - r * (cos * sin * x_t + sigma_data * t_F)


def normalized(g: Tensor, constant: float, norm: Literal["l2", "rms"]) -> Tensor:
    """The step g / (||g|| + c) of each sample (sCM section 4.1). "rms" compares c with ||g|| / sqrt(D)."""
    scale = rms_factor(g) if norm == "rms" else 1.0
    return g / per_sample(l2_norm(g) / scale + constant, g)


def warmup(images: int, warmup_images: int) -> float:
    """r rises linearly from 0 to 1 (sCM section 4.1)."""
    return min(1.0, images / warmup_images) if warmup_images else 1.0


class Evaluation(NamedTuple):
    """F and w of the student with their graph; the tangent g, and cos t sin t dF/dt in it, without."""

    F: Tensor
    log_weight: Tensor
    g: Tensor
    t_F: Tensor


@dataclass(frozen=True)
class SimplifiedConsistency(FollowsFlow, TrigFlowDraws, ABC):
    """What sCM's objectives share: a tangent that is normalised, warmed up and weighted (sCM section 4)."""

    distill: bool
    tangent_normalization: Literal["l2", "rms"]
    tangent_constant: float
    tangent_warmup_images: int
    guidance: tuple[float, float] | None = None  # the scale is drawn uniformly from this interval (sCM section 5)

    def draw(self, generator: SampleGenerator, batch: Batch, progress: Progress) -> Draws:
        draws = super().draw(generator, batch, progress)
        return replace(draws, guidance=self.scale(generator, self.guidance))

    def warmup(self, progress: Progress) -> float:
        """The factor r."""
        return warmup(progress.images, self.tangent_warmup_images)

    @abstractmethod
    def evaluate(self, draws: Draws, networks: Networks) -> Evaluation:
        """The student and its tangent at the draws."""

    def loss(self, draws: Draws, networks: Networks) -> Loss:
        """Of the student at the draws."""
        return self.loss_of(self.evaluate(draws, networks))

    def loss_of(self, evaluation: Evaluation) -> Loss:
        """e^w / D ||F - F- - g / (||g|| + c)||^2 - w (sCM eq. 8)."""
        F, log_weight, g, t_F = evaluation
        sound = is_finite(F) & is_finite(g)
        F = kept(F, sound)
        target, step = F.detach(), normalized(kept(g, sound), self.tangent_constant, self.tangent_normalization)
        error = mean_square(F - (target + step))
        diagnostics = {
            "tangent_norm": l2_norm(g),
            "tangent_ratio": l2_norm(t_F) / l2_norm(target).clamp_min(torch.finfo(F.dtype).tiny),
            "log_weight": log_weight.detach(),
        }
        return Loss(weighted(error, log_weight).where(sound, 0), diagnostics, dropped=~sound)


@dataclass(frozen=True)
class ContinuousConsistency(SimplifiedConsistency):
    """sCT where there is no teacher, sCD where there is one. The tangent's direction is the velocity used for dx/dt."""

    segments: int = 1

    def times(self, generator: SampleGenerator, progress: Progress) -> tuple[Tensor, Tensor | None]:
        """t as ever; where there are segments, also the lower end of its own, whose ends are even in [0, T_MAX]."""
        t, _ = super().times(generator, progress)
        if self.segments == 1:
            return t, None
        index = (t * (self.segments / T_MAX)).floor().clamp(max=self.segments - 1)
        return t, index * (T_MAX / self.segments)

    def evaluate(self, draws: Draws, networks: Networks) -> Evaluation:
        at = self.trajectory(draws, networks)
        (F, log_weight), t_F = networks.tangent(networks.student, at.primals, at.direction, *at.conditions)
        g = consistency_tangent(at.x_t, at.dx_dt, F.detach(), t_F, self.gap(draws), draws.r, self.sigma_data)
        return Evaluation(F, log_weight, g, t_F)

    def trajectory(self, draws: Draws, networks: Networks) -> Trajectory:
        """Where the student is evaluated, and the direction of its tangent."""
        x_t = diffuse(draws.x0, draws.z, draws.t)
        return self.trajectory_at(draws, x_t, networks, self.gap(draws), self.conditions(draws))

    def gap(self, draws: Draws) -> Tensor:
        """Delta = t - t_k, from the time to where the consistency function goes: (B,)."""
        return draws.t if draws.s is None else draws.t - draws.s

    def conditions(self, draws: Draws) -> tuple[Any, ...]:
        """What the student takes after (u, t): where there are segments also the end of its own."""
        return draws.conditions if draws.s is None else (draws.labels, draws.guidance, draws.s)
