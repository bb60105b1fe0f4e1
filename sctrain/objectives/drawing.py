"""The random part that TrigFlow objectives share: times, noise, label dropout."""

import math

import torch
from torch import Tensor

from sctrain.objectives.base import Batch
from sctrain.processes import T_MAX
from sctrain.randomness import SampleGenerator


def trigflow_times(generator: SampleGenerator, mean: float, std: float, sigma_data: float) -> Tensor:
    """Tau ~ N(mean, std^2), t = arctan(exp(tau) / sigma_d) (sCM eq. 5), at most T_MAX: (B,)."""
    tau = mean + std * generator.normal()
    return torch.atan(tau.exp() / sigma_data).clamp(max=T_MAX)


def noise(generator: SampleGenerator, batch: Batch, sigma_data: float) -> Tensor:
    """Z ~ N(0, sigma_d^2 I), of the images' shape."""
    return sigma_data * generator.normal(batch.x0.shape[1:])


def drop_labels(generator: SampleGenerator, labels: Tensor, probability: float, num_classes: int) -> Tensor:
    """Labels, each replaced by "no class" with the given probability."""
    return torch.where(generator.uniform() < probability, num_classes, labels)


def l2_norm(x: Tensor) -> Tensor:
    """Norm over everything but the batch: (B, ...) -> (B,)."""
    return x.flatten(1).norm(dim=1)


def mean_square(x: Tensor) -> Tensor:
    """||x||^2 / D per sample: (B, ...) -> (B,)."""
    return x.flatten(1).square().mean(dim=1)


def rms_factor(x: Tensor) -> float:
    """sqrt(D): the ratio of the l2 norm to the root mean square."""
    return math.sqrt(x[0].numel())
