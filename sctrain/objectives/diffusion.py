"""Diffusion, the teacher's objective: EDM's and TrigFlow's are one (sCM section 3), with EDM2's adaptive weighting."""

from dataclasses import dataclass, replace

from torch import Tensor

from sctrain.augmentation import draw_labels, transformed
from sctrain.objectives.base import Batch, Draws, Loss, Networks, Progress
from sctrain.objectives.drawing import TrigFlowDraws, is_finite, kept, mean_square
from sctrain.processes import diffuse, velocity
from sctrain.randomness import Purpose, SampleGenerator


def weighted(square_error: Tensor, log_weight: Tensor) -> Tensor:
    """e^w ||error||^2 / D - w: at its optimum e^-w is the expected error, so every time counts alike (EDM2 eq. 21)."""
    return log_weight.exp() * square_error - log_weight


def velocity_error(F: Tensor, x0: Tensor, z: Tensor, t: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """||F - v_t / sigma_d||^2 / D, 0 where F is not finite, and where it is: (B,) each."""
    sound = is_finite(F)
    return mean_square(kept(F - velocity(x0, z, t) / sigma_data, sound)), sound


@dataclass(frozen=True)
class Diffusion(TrigFlowDraws):
    """E[ e^w(t) / D ||sigma_d F(x_t / sigma_d, t) - v_t||^2 - w(t) ], the error in units of sigma_d (sCM eq. 5).

    Without a learned weighting w = 0, and this is EDM's lambda(sigma) ||D - x0||^2 / D (Karras et al. 2022, eq. 8).
    """

    learned_weighting: bool = True
    augmentation: float = 0.0  # probability of each of EDM's transformations, of which the network is told

    def draw(self, generator: SampleGenerator, batch: Batch, progress: Progress) -> Draws:
        draws = super().draw(generator, batch, progress)
        if not self.augmentation:
            return draws
        # On the CPU, where which samples need what can be asked without waiting for a GPU.
        labels = draw_labels(generator.of(Purpose.AUGMENTATION, "cpu"), self.augmentation)
        x0 = transformed(batch.x0, labels)
        return replace(draws, x0=x0, augmentation=labels.to(x0.device, x0.dtype, non_blocking=True))

    def loss(self, draws: Draws, networks: Networks) -> Loss:
        x_t = diffuse(draws.x0, draws.z, draws.t)
        F, log_weight = networks.student(x_t / self.sigma_data, draws.t, *draws.conditions)
        error, sound = velocity_error(F, draws.x0, draws.z, draws.t, self.sigma_data)
        diagnostics = {"velocity_error": error.detach()}
        if not self.learned_weighting:
            return Loss(error, diagnostics, dropped=~sound)
        diagnostics["log_weight"] = log_weight.detach()
        return Loss(weighted(error, log_weight).where(sound, 0), diagnostics, dropped=~sound)
