"""Continuous-time consistency: sCT from data alone, sCD from a teacher (sCM algorithm 1).

The consistency function f = cos t x_t - sin t sigma_d F must be constant along a trajectory: df/dt = 0. With F- = sg F,

    cos t df/dt = -cos^2 t (sigma_d F- - dx/dt) - (cos t sin t x_t + sigma_d cos t sin t dF-/dt)         (sCM eq. 7, 8)

is the tangent g; training moves F along g / (||g|| + c). `r` warms the second, unstable part up.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sctrain.guidance import guided
from sctrain.objectives.base import Batch, Draws, Loss, Networks, Progress
from sctrain.objectives.diffusion import weighted
from sctrain.objectives.drawing import TrigFlowDraws, l2_norm, mean_square, rms_factor
from sctrain.processes import diffuse, per_sample, velocity
from sctrain.randomness import SampleGenerator


def consistency_tangent(
    x_t: Tensor, dx_dt: Tensor, F: Tensor, t_F: Tensor, t: Tensor, r: float, sigma_data: float
) -> Tensor:
    """g = -cos^2 t (sigma_d F - dx/dt) - r (cos t sin t x_t + sigma_d t_F); t_F = cos t sin t dF/dt (sCM eq. 8)."""
    cos, sin = per_sample(t.cos(), x_t), per_sample(t.sin(), x_t)
    return -(cos**2) * (sigma_data * F - dx_dt) - r * (cos * sin * x_t + sigma_data * t_F)


def normalized(g: Tensor, constant: float, norm: Literal["l2", "rms"]) -> Tensor:
    """G / (||g|| + c) per sample (sCM section 4.1). "rms" compares c with ||g|| / sqrt(D), as FastGen does."""
    scale = rms_factor(g) if norm == "rms" else 1.0
    return g / per_sample(l2_norm(g) / scale + constant, g)


class Trajectory(NamedTuple):
    """A point of the trajectory, and the network's inputs there with their tangents cos t sin t d/dt."""

    x_t: Tensor
    dx_dt: Tensor
    primals: tuple[Tensor, Tensor]  # u = x_t / sigma_data, and t
    direction: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ContinuousConsistency(TrigFlowDraws):
    """sCT where there is no teacher, sCD where there is one. The tangent's direction is the velocity used for dx/dt."""

    distill: bool
    tangent_normalization: Literal["l2", "rms"]
    tangent_constant: float
    tangent_warmup_images: int
    guidance: tuple[float, float] | None = None  # the scale is drawn uniformly from this interval (sCM section 5)

    def draw(self, generator: SampleGenerator, batch: Batch, progress: Progress) -> Draws:
        draws = super().draw(generator, batch, progress)
        if self.guidance is None:
            return draws
        low, high = self.guidance
        return replace(draws, guidance=low + (high - low) * generator.uniform())

    def warmup(self, progress: Progress) -> float:
        """r rises linearly from 0 to 1 (sCM section 4.1)."""
        return min(1.0, progress.images / self.tangent_warmup_images) if self.tangent_warmup_images else 1.0

    def loss(self, draws: Draws, networks: Networks) -> Loss:
        at = self.trajectory(draws, networks)
        (F, log_weight), t_F = networks.tangent(networks.student, at.primals, at.direction, *draws.conditions)
        target = F.detach()
        g = consistency_tangent(at.x_t, at.dx_dt, target, t_F, draws.t, draws.r, self.sigma_data)
        sound = g.isfinite().flatten(1).all(dim=1)  # a tangent that overflowed teaches nothing: its sample is dropped
        step = normalized(g.where(per_sample(sound, g), 0), self.tangent_constant, self.tangent_normalization)
        error = mean_square(F - (target + step))
        diagnostics = {
            "tangent_norm": l2_norm(g),
            "tangent_ratio": l2_norm(t_F) / l2_norm(target).clamp_min(torch.finfo(F.dtype).tiny),
            "log_weight": log_weight.detach(),
        }
        return Loss(weighted(error, log_weight).where(sound, 0), diagnostics, dropped=~sound)

    def trajectory(self, draws: Draws, networks: Networks) -> Trajectory:
        """Where the student is evaluated, and the direction of its tangent."""
        x_t, t = diffuse(draws.x0, draws.z, draws.t), draws.t
        u = x_t / self.sigma_data
        dx_dt = self.flow_velocity(draws, u, networks)
        # Rearranged so that no intermediate tangent grows near t = 0 or pi/2: the direction carries cos t sin t.
        cos_sin = t.cos() * t.sin()
        return Trajectory(x_t, dx_dt, (u, t), (per_sample(cos_sin, u) * dx_dt / self.sigma_data, cos_sin))

    def flow_velocity(self, draws: Draws, u: Tensor, networks: Networks) -> Tensor:
        """dx_t/dt: the teacher's sigma_d F (sCD), guided or not, or cos t z - sin t x0 of this very sample (sCT)."""
        if not self.distill:
            return velocity(draws.x0, draws.z, draws.t)
        assert networks.teacher is not None, "sCD needs a teacher"
        with torch.no_grad():
            if draws.guidance is None:
                return self.sigma_data * networks.teacher(u, draws.t, draws.labels)[0]
            return self.sigma_data * guided(
                networks.teacher, u, draws.t, draws.labels, draws.guidance, self.num_classes
            )
