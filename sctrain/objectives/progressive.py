"""Progressive distillation (Salimans & Ho 2022): one step of the student does what two of its teacher do.

With t - t'' one step of the student's N and t' in the middle, the teacher jumps t -> t' -> t''; the student must get
there in one jump, which fixes its output at t:

    F~ = (cos(t - t'') x_t - x_t'') / (sigma_d sin(t - t''))

The teacher is the target network: the diffusion model at first, the student itself whenever N halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sctrain.objectives.base import Batch, Draws, Loss, Networks, Progress
from sctrain.objectives.drawing import Data, is_finite, kept, mean_square
from sctrain.processes import T_MAX, diffuse, jump, per_sample
from sctrain.randomness import SampleGenerator


def stage_at(progress: Progress, first_steps: int, last_steps: int) -> int:
    """How often the student has become its own teacher: the stages are equal parts of the budget."""
    stages = (first_steps // last_steps).bit_length()
    return min(int(progress.done * stages + 1e-9), stages - 1)


def steps_at(progress: Progress, first_steps: int, last_steps: int) -> int:
    """N."""
    return first_steps >> stage_at(progress, first_steps, last_steps)


@dataclass(frozen=True)
class ProgressiveDistillation(Data):
    """N halves from `first_steps` to `last_steps` in equal parts of the budget."""

    label_dropout: float
    first_steps: int
    last_steps: int
    weighting: Literal["snr_plus_one", "truncated_snr"]

    def stage(self, progress: Progress) -> int:
        """How often the student has become its own teacher."""
        return stage_at(progress, self.first_steps, self.last_steps)

    def steps(self, progress: Progress) -> int:
        """N."""
        return steps_at(progress, self.first_steps, self.last_steps)

    def draw(self, generator: SampleGenerator, batch: Batch, progress: Progress) -> Draws:
        """t = T_MAX i / N, i ~ U{1 .. N}, and t'' = T_MAX (i - 1) / N: even in the angle, PD's cosine schedule."""
        steps = self.steps(progress)
        index = (generator.uniform() * steps).long().clamp(max=steps - 1)
        t, s = (T_MAX * (index + end).to(batch.x0.dtype) / steps for end in (1, 0))
        z, labels = self.noise(generator, batch), self.labels(generator, batch, self.label_dropout)
        return Draws(batch.x0, z, t, labels, s=s)

    def loss(self, draws: Draws, networks: Networks) -> Loss:
        assert draws.s is not None and networks.target is not None, "two times, and an earlier self"
        x_t, t = diffuse(draws.x0, draws.z, draws.t), draws.t
        target = self.two_steps(networks, x_t, draws)
        F, _ = networks.student(x_t / self.sigma_data, t, *draws.conditions)
        sound = is_finite(F) & is_finite(target)
        error = mean_square(kept(F, sound) - kept(target, sound))
        per_image = (self.weight(t) * error).where(sound, 0)
        return Loss(per_image, {"velocity_error": error.detach()}, dropped=~sound)

    @torch.no_grad()
    def two_steps(self, networks: Networks, x_t: Tensor, draws: Draws) -> Tensor:
        """F~, from two DDIM steps of the target network."""
        assert draws.s is not None and networks.target is not None
        x, middle = x_t, 0.5 * (draws.t + draws.s)
        for now, then in ((draws.t, middle), (middle, draws.s)):
            F, _ = networks.target(x / self.sigma_data, now, *draws.conditions)
            x = jump(x, F, now, then, self.sigma_data)
        gap = per_sample(draws.t - draws.s, x)
        return (gap.cos() * x_t - x) / (self.sigma_data * gap.sin())

    def weight(self, t: Tensor) -> Tensor:
        """Of the error of F, which is that of x times 1 / sin^2 t: 1 + SNR on x is 1 here, max(1, SNR) what follows."""
        return torch.ones_like(t) if self.weighting == "snr_plus_one" else torch.maximum(t.sin(), t.cos()) ** 2

    def target_keep(self, before: Progress, after: Progress) -> float | None:
        """The student becomes the teacher where N halves."""
        return 1.0 if self.stage(before) == self.stage(after) else 0.0
