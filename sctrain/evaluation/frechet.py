"""Frechet distance between two sets of features, from float64 moments that are gathered block by block.

The formula is torch-fidelity's, so that figures agree with other code; the moments are ours, because torch-fidelity
keeps all features in memory and takes float32 means.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric


@dataclass(frozen=True)
class Moments:
    """Count, mean (D,) and sum of squared deviations (D, D), float64. Sums of two are the moments of the union."""

    count: int
    mean: Tensor
    scatter: Tensor

    @staticmethod
    def of(features: Tensor) -> "Moments":
        """Of (N, D), N >= 1."""
        features = features.double()
        mean = features.mean(dim=0)
        return Moments(len(features), mean, (features - mean).T @ (features - mean))

    @staticmethod
    def over(blocks: Iterable[Tensor]) -> "Moments":
        """Of the union of blocks (N_i, D); empty blocks are passed over."""
        return reduce(Moments.__add__, (Moments.of(block) for block in blocks if len(block)))

    def __add__(self, other: "Moments") -> "Moments":
        """Chan, Golub and LeVeque (1979): stable where the means are far from zero."""
        count = self.count + other.count
        apart = other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, self.mean + apart * (other.count / count), scatter)

    @property
    def covariance(self) -> Tensor:
        """Unbiased (D, D)."""
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017)."""
    statistics = [{"mu": m.mean.numpy(), "sigma": m.covariance.numpy()} for m in (a, b)]
    return max(0.0, fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])
