"""The random part that TrigFlow objectives share: times, noise, label dropout; and what is asked of each sample."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sctrain.guidance import guided_by, guided_network
from sctrain.objectives.base import Batch, Draws, Networks, Progress
from sctrain.parameterization import Network
from sctrain.processes import T_MAX, per_sample, time_of
from sctrain.randomness import SampleGenerator


@dataclass(frozen=True)
class Data:
    """What an objective knows of its data: their standard deviation; label `num_classes` means none."""

    sigma_data: float
    num_classes: int

    def noise(self, generator: SampleGenerator, batch: Batch) -> Tensor:
        """Noise z ~ N(0, sigma_d^2 I): (B, C, H, W)."""
        return self.sigma_data * generator.normal(batch.x0.shape[1:])

    def labels(self, generator: SampleGenerator, batch: Batch, dropout: float) -> Tensor:
        """The labels, each dropped with this probability: (B,)."""
        return torch.where(generator.uniform() < dropout, self.num_classes, batch.labels)

    def lognormal_times(self, generator: SampleGenerator, mean: float, std: float) -> Tensor:
        """tau ~ N(mean, std^2), t = arctan(exp(tau) / sigma_d) (sCM eq. 5), at most T_MAX: (B,)."""
        tau = mean + std * generator.normal()
        return time_of(tau.exp(), self.sigma_data).clamp(max=T_MAX)

    def scale(self, generator: SampleGenerator, interval: tuple[float, float] | None) -> Tensor | None:
        """The scale of guidance, uniform in `interval`: (B,); None where there is none."""
        if interval is None:
            return None
        low, high = interval
        return low + (high - low) * generator.uniform()

    def teacher(self, draws: Draws, networks: Networks) -> Network:
        """The teacher of a distillation as a function of (u, t, labels), guided where the draws have a scale.

        By itself without a label, or by the run's guide.
        """
        assert networks.teacher is not None, "a distillation needs a teacher"
        if draws.guidance is None:
            return networks.teacher
        if networks.guide is not None:
            return guided_by(networks.teacher, networks.guide.network, draws.guidance, networks.guide.no_label)
        return guided_network(networks.teacher, draws.guidance, self.num_classes)

    def target_keep(self, before: Progress, after: Progress) -> float | None:
        """The part of the target network that an optimizer step leaves; None: there is no target."""
        return None


@dataclass(frozen=True)
class TrigFlowDraws(Data):
    """Settings of the draw."""

    time_mean: float
    time_std: float
    label_dropout: float

    def draw(self, generator: SampleGenerator, batch: Batch, progress: Progress) -> Draws:
        """Times, z ~ N(0, sigma_d^2 I), and labels of which some are dropped."""
        t, s = self.times(generator, progress)
        z = self.noise(generator, batch)
        labels = self.labels(generator, batch, self.label_dropout)
        return Draws(batch.x0, z, t, labels, self.warmup(progress), s=s)

    def times(self, generator: SampleGenerator, progress: Progress) -> tuple[Tensor, Tensor | None]:
        """Lognormal ones, and no second time."""
        return self.lognormal_times(generator, self.time_mean, self.time_std), None

    def warmup(self, progress: Progress) -> float:
        """The factor r of the draws; objectives without a warm-up have 1."""
        return 1.0


def is_finite(x: Tensor) -> Tensor:
    """Whether a sample is finite everywhere: (B, ...) -> (B,). What has overflowed teaches nothing and is dropped."""
    return x.detach().isfinite().flatten(1).all(dim=1)


def kept(x: Tensor, sound: Tensor) -> Tensor:
    """x with zeros in place of the samples that are dropped: (B, ...), (B,) -> (B, ...).

    No gradient passes there. A network's output has to be replaced before anything is computed from it, for what is
    masked later still has a slope that is not finite, and 0 times that is nan for every sample.
    """
    return x.where(per_sample(sound, x), 0)


def l2_norm(x: Tensor) -> Tensor:
    """Norm over everything but the batch: (B, ...) -> (B,)."""
    return x.flatten(1).norm(dim=1)


def mean_square(x: Tensor) -> Tensor:
    """||x||^2 / D per sample: (B, ...) -> (B,)."""
    return x.flatten(1).square().mean(dim=1)


def rms_factor(x: Tensor) -> float:
    """sqrt(D): the ratio of the l2 norm to the root mean square."""
    return math.sqrt(x[0].numel())
