"""What is said about a set of images besides its Frechet distance. Pure functions; distances are computed in blocks.

Features are (N, D) float64, images (N, C, H, W) uint8.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1024


@dataclass(frozen=True)
class Manifold:
    """Balls around points (N, D), each as large as the distance to the k-th neighbour (N,).

    Improved precision and recall (Kynkaanniemi et al. 2019): how much of the generated set lies on the manifold of the
    real one, and the other way round.
    """

    points: Tensor
    radii: Tensor

    @staticmethod
    def of(points: Tensor, k: int = 3) -> "Manifold":
        """A point is not its own neighbour; fewer than k neighbours count as k."""
        nearest = min(k + 1, len(points))
        kth = [torch.cdist(block, points).topk(nearest, largest=False).values[:, -1] for block in points.split(BLOCK)]
        return Manifold(points, torch.cat(kth))

    def share_inside(self, points: Tensor) -> float:
        """Fraction of `points` (M, D) inside at least one ball."""
        inside = [(torch.cdist(block, self.points) <= self.radii).any(dim=1) for block in points.split(BLOCK)]
        return torch.cat(inside).double().mean().item()


def class_agreement(predicted: Tensor, labels: Tensor) -> float:
    """Fraction of images that the classifier takes for what was asked for."""
    return (predicted == labels).double().mean().item()


def nearest_distance(images: Tensor, reference: Tensor) -> float:
    """Mean Euclidean distance, in pixel values, of each image to the nearest of `reference`."""
    points, others = images.flatten(1).double(), reference.flatten(1)
    nearest = torch.full((len(points),), torch.inf, dtype=points.dtype)
    for other in others.split(BLOCK):
        closest = [torch.cdist(block, other.double()).amin(dim=1) for block in points.split(BLOCK)]
        nearest = torch.minimum(nearest, torch.cat(closest))
    return nearest.mean().item()


def mean_squared_distance(a: Tensor, b: Tensor) -> float:
    """Mean over images and elements of (a - b)^2."""
    return (a.double() - b.double()).square().mean().item()
