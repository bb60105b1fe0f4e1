"""The random part that TrigFlow objectives share: times, noise, label dropout; and norms per sample."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sctrain.objectives.base import Batch, Draws, Progress
from sctrain.processes import T_MAX
from sctrain.randomness import SampleGenerator


@dataclass(frozen=True)
class TrigFlowDraws:
    """Settings of the draw: data of standard deviation `sigma_data`; label `num_classes` means none."""

    sigma_data: float
    num_classes: int
    time_mean: float
    time_std: float
    label_dropout: float

    def draw(self, generator: SampleGenerator, batch: Batch, progress: Progress) -> Draws:
        """tau ~ N(mean, std^2), t = arctan(exp(tau) / sigma_d) (sCM eq. 5), at most T_MAX; z ~ N(0, sigma_d^2 I)."""
        tau = self.time_mean + self.time_std * generator.normal()
        t = torch.atan(tau.exp() / self.sigma_data).clamp(max=T_MAX)
        z = self.sigma_data * generator.normal(batch.x0.shape[1:])
        labels = torch.where(generator.uniform() < self.label_dropout, self.num_classes, batch.labels)
        return Draws(batch.x0, z, t, labels, self.warmup(progress))

    def warmup(self, progress: Progress) -> float:
        """The factor r of the draws; objectives without a warm-up have 1."""
        return 1.0


def l2_norm(x: Tensor) -> Tensor:
    """Norm over everything but the batch: (B, ...) -> (B,)."""
    return x.flatten(1).norm(dim=1)


def mean_square(x: Tensor) -> Tensor:
    """||x||^2 / D per sample: (B, ...) -> (B,)."""
    return x.flatten(1).square().mean(dim=1)


def rms_factor(x: Tensor) -> float:
    """sqrt(D): the ratio of the l2 norm to the root mean square."""
    return math.sqrt(x[0].numel())
