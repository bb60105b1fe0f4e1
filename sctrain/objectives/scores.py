"""sCD with variational score distillation (sCM appendix D): what the student draws shall be as likely as the teacher's.

A second diffusion model phi, the fake score, learns what the student draws in one step, g = f(z', T_MAX), by

    L_Diff(phi) = e^w / D ||F_phi(x_t / sigma_d, t) - v_t / sigma_d||^2 - w        x_t, v_t of x0 = sg g

and the student is moved by the difference of the two scores of its images, noised to x_t:

    L_VSD(theta) = e^w' / D ||g - sg g + (F_teacher - F_phi)(x_t / sigma_d, t)||^2 - w'

for dL/dg is 2 e^w' / D (F_teacher - F_phi), and F falls where the score rises. The loss is L_sCM + lambda L_VSD. Scores
are constants to the student, and its images to phi. w' is trained where phi is: its gradient is the same there.

The student is traversed once, its one-step images beside the points where it is differentiated, for ZeRO-3 reduces a
parameter's gradient once per backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sctrain.objectives.base import Batch, Draws, Loss, Networks, Progress
from sctrain.objectives.continuous import ContinuousConsistency, Evaluation, consistency_tangent
from sctrain.objectives.diffusion import velocity_error, weighted
from sctrain.objectives.drawing import is_finite, kept, mean_square
from sctrain.processes import T_MAX, denoise, diffuse
from sctrain.randomness import SampleGenerator


@dataclass(frozen=True, kw_only=True)
class ScoreDraws(Draws):
    """With what the student draws from, and how its images are noised for either loss: (B, C, H, W) and (B,)."""

    drawn_from: Tensor
    compared_z: Tensor
    compared_t: Tensor
    learnt_z: Tensor
    learnt_t: Tensor


@dataclass(frozen=True, kw_only=True)
class ScoreDistillation(ContinuousConsistency):
    """sCD + VSD. Times: ln sigma ~ N(mean, std^2)."""

    factor: float  # lambda
    compared_at: tuple[float, float]  # (mean, std) of the times of L_VSD
    learnt_at: tuple[float, float]  # of those of L_Diff

    def draw(self, generator: SampleGenerator, batch: Batch, progress: Progress) -> ScoreDraws:
        draws = super().draw(generator, batch, progress)
        return ScoreDraws(
            **vars(draws),
            drawn_from=self.noise(generator, batch),
            compared_z=self.noise(generator, batch),
            compared_t=self.lognormal_times(generator, *self.compared_at),
            learnt_z=self.noise(generator, batch),
            learnt_t=self.lognormal_times(generator, *self.learnt_at),
        )

    def loss(self, draws: Draws, networks: Networks) -> Loss:
        assert isinstance(draws, ScoreDraws)
        evaluation, F_drawn = self.traverse(draws, networks)
        consistency = self.loss_of(evaluation)
        sound = is_finite(F_drawn)
        t_max = torch.full_like(draws.t, T_MAX)
        images = denoise(draws.drawn_from, kept(F_drawn, sound), t_max, self.sigma_data)
        difference, balance = self.score_difference(images.detach(), draws, networks)
        sound = sound & is_finite(difference)  # not in place: the images' graph has the other
        difference = kept(difference, sound)
        # Of the square ||g - sg g + d||^2 the gradient of g is all that the student needs; w' has its own below.
        distance = weighted(mean_square(images - images.detach() + difference), balance.detach()).where(sound, 0)
        learnt, error = self.score_loss(images.detach(), difference, draws, networks)
        assert consistency.dropped is not None
        total = consistency.per_sample + self.factor * distance
        diagnostics = {
            **consistency.diagnostics,
            "consistency": consistency.per_sample.detach(),
            "score_difference": mean_square(difference).detach(),
            "score_error": error,
        }
        times = {"score_difference": draws.compared_t, "score_error": draws.learnt_t}
        return Loss(total, diagnostics, consistency.dropped | ~sound, times=times, beside=learnt.where(sound, 0))

    def traverse(self, draws: ScoreDraws, networks: Networks) -> tuple[Evaluation, Tensor]:
        """The student along its trajectory, and F of its one-step images, whose direction is 0."""
        at = self.trajectory(draws, networks)
        u = torch.cat([at.primals[0], draws.drawn_from / self.sigma_data])
        t = torch.cat([draws.t, torch.full_like(draws.t, T_MAX)])
        direction = tuple(torch.cat([part, torch.zeros_like(part)]) for part in at.direction)
        conditions = tuple(_twice(condition) for condition in at.conditions)
        (F, log_weight), t_F = networks.tangent(networks.student, (u, t), direction, *conditions)
        count = len(draws.t)
        (F, F_drawn), log_weight, t_F = F.split(count), log_weight[:count], t_F[:count]
        g = consistency_tangent(at.x_t, at.dx_dt, F.detach(), t_F, draws.t, draws.r, self.sigma_data)
        return Evaluation(F, log_weight, g, t_F), F_drawn

    @torch.no_grad()
    def score_difference(self, images: Tensor, draws: ScoreDraws, networks: Networks) -> tuple[Tensor, Tensor]:
        """F_teacher - F_phi at the noised images, and w': (B, C, H, W), (B,)."""
        t = draws.compared_t
        u = diffuse(images, draws.compared_z, t) / self.sigma_data
        F, _ = self.teacher(draws, networks)(u, t, draws.labels)
        F_fake, weights = self._score(networks)(u, t, draws.labels, draws.guidance, t)
        return F - F_fake, weights[:, 1]

    def score_loss(
        self, images: Tensor, difference: Tensor, draws: ScoreDraws, networks: Networks
    ) -> tuple[Tensor, Tensor]:
        """What phi and w' are trained on, and phi's error: (B,) each."""
        u = diffuse(images, draws.learnt_z, draws.learnt_t) / self.sigma_data
        F, weights = self._score(networks)(u, draws.learnt_t, draws.labels, draws.guidance, draws.compared_t)
        error, sound = velocity_error(F, images, draws.learnt_z, draws.learnt_t, self.sigma_data)
        learnt, balance = weights.unbind(dim=1)
        losses = weighted(error, learnt) + weighted(mean_square(difference), balance)
        return losses.where(sound, 0), error.detach()

    def _score(self, networks: Networks) -> Any:
        assert networks.score is not None, "score distillation trains a score beside the student"
        return networks.score


def _twice(condition: Tensor | None) -> Tensor | None:
    return None if condition is None else torch.cat([condition, condition])
