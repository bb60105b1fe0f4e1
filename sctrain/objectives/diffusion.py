"""TrigFlow diffusion, the teacher's objective (sCM section 3 with the adaptive weighting of EDM2)."""

from dataclasses import dataclass

from torch import Tensor

from sctrain.objectives.base import Batch, Draws, Loss, Networks, Progress
from sctrain.objectives.drawing import drop_labels, mean_square, noise, trigflow_times
from sctrain.processes import diffuse, velocity
from sctrain.randomness import SampleGenerator


def weighted(square_error: Tensor, log_weight: Tensor) -> Tensor:
    """e^w ||error||^2 / D - w: at its optimum e^-w is the expected error, so every time counts alike (EDM2 eq. 21)."""
    return log_weight.exp() * square_error - log_weight


@dataclass(frozen=True)
class TrigFlowDiffusion:
    """E[ e^w(t) / D ||sigma_d F(x_t / sigma_d, t) - v_t||^2 - w(t) ], the error in units of sigma_d (sCM eq. 5)."""

    sigma_data: float
    num_classes: int
    time_mean: float
    time_std: float
    label_dropout: float

    def draw(self, generator: SampleGenerator, batch: Batch, progress: Progress) -> Draws:
        t = trigflow_times(generator, self.time_mean, self.time_std, self.sigma_data)
        z = noise(generator, batch, self.sigma_data)
        labels = drop_labels(generator, batch.labels, self.label_dropout, self.num_classes)
        return Draws(batch.x0, z, t, labels)

    def loss(self, draws: Draws, networks: Networks) -> Loss:
        x_t = diffuse(draws.x0, draws.z, draws.t)
        F, log_weight = networks.student(x_t / self.sigma_data, draws.t, draws.labels)
        error = mean_square(F - velocity(draws.x0, draws.z, draws.t) / self.sigma_data)
        return Loss(weighted(error, log_weight), {"velocity_error": error.detach(), "log_weight": log_weight.detach()})
