"""Diffusion, the teacher's objective: EDM's and TrigFlow's are one (sCM section 3), with EDM2's adaptive weighting."""

from dataclasses import dataclass

from torch import Tensor

from sctrain.objectives.base import Draws, Loss, Networks
from sctrain.objectives.drawing import TrigFlowDraws, mean_square
from sctrain.processes import diffuse, velocity


def weighted(square_error: Tensor, log_weight: Tensor) -> Tensor:
    """e^w ||error||^2 / D - w: at its optimum e^-w is the expected error, so every time counts alike (EDM2 eq. 21)."""
    return log_weight.exp() * square_error - log_weight


@dataclass(frozen=True)
class Diffusion(TrigFlowDraws):
    """E[ e^w(t) / D ||sigma_d F(x_t / sigma_d, t) - v_t||^2 - w(t) ], the error in units of sigma_d (sCM eq. 5).

    Without a learned weighting w = 0, and this is EDM's lambda(sigma) ||D - x0||^2 / D (Karras et al. 2022, eq. 8).
    """

    learned_weighting: bool = True

    def loss(self, draws: Draws, networks: Networks) -> Loss:
        x_t = diffuse(draws.x0, draws.z, draws.t)
        F, log_weight = networks.student(x_t / self.sigma_data, draws.t, draws.labels)
        error = mean_square(F - velocity(draws.x0, draws.z, draws.t) / self.sigma_data)
        if not self.learned_weighting:
            return Loss(error, {"velocity_error": error.detach()})
        return Loss(weighted(error, log_weight), {"velocity_error": error.detach(), "log_weight": log_weight.detach()})
