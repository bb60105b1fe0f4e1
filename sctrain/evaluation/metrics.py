"""What is said about a set of images besides its Frechet distance. Pure functions; distances are computed in blocks.

Features are (N, D) float64, images (N, C, H, W) uint8.
"""

import torch
from torch import Tensor

BLOCK = 1024


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019): how much of each set lies on the manifold of the other.

    A set's manifold is the union of balls around its points, each as large as the distance to the k-th neighbour.
    """
    return covered(generated, real, neighbour_radii(real, k)), covered(real, generated, neighbour_radii(generated, k))


def neighbour_radii(points: Tensor, k: int) -> Tensor:
    """Distance of each point to its k-th neighbour, itself not counted: (N, D) -> (N,)."""
    k = min(k, len(points) - 1)
    return torch.cat([torch.cdist(block, points).kthvalue(k + 1, dim=1).values for block in points.split(BLOCK)])


def covered(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Fraction of `points` inside at least one ball."""
    inside = [(torch.cdist(block, centres) <= radii).any(dim=1) for block in points.split(BLOCK)]
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
