"""Distances between images (B, C, H, W), one per sample (B,)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from sctrain.config.objectives import Distance
from sctrain.objectives.drawing import mean_square
from sctrain.objectives.perceptual import build_perceptual
from sctrain.processes import ModelSpace

Metric = Callable[[Tensor, Tensor], Tensor]
# The root's slope at 0 is infinite where c = 0: the least that keeps the gradient of what is equal finite.
_LEAST_SQUARE = 1e-24


def l2(x: Tensor, y: Tensor) -> Tensor:
    """||x - y||^2 / D: CM 2023's l2, squared and averaged over pixels."""
    return mean_square(x - y)


def l1(x: Tensor, y: Tensor) -> Tensor:
    """||x - y||_1 / D (CM 2023)."""
    return (x - y).flatten(1).abs().mean(dim=1)


def pseudo_huber(x: Tensor, y: Tensor, c: float) -> Tensor:
    """sqrt(||x - y||^2 + c^2) - c over the whole sample (iCT eq. 8, ECT); c = 0 is the plain norm."""
    square = (x - y).flatten(1).square().sum(dim=1)
    return (square + max(c * c, _LEAST_SQUARE)).sqrt() - c


def elementwise_huber(x: Tensor, y: Tensor, c: float) -> Tensor:
    """mean(sqrt((x - y)^2 + c^2) - c) over pixels (LCM)."""
    return (((x - y).flatten(1).square() + max(c * c, _LEAST_SQUARE)).sqrt() - c).mean(dim=1)


def ict_constant(shape: tuple[int, ...]) -> float:
    """c = 0.00054 sqrt(D) of iCT's pseudo-Huber metric, for images (C, H, W)."""
    return 0.00054 * math.sqrt(math.prod(shape))


@dataclass(frozen=True)
class Images:
    """What the images of a run are: their shape (C, H, W), and how pixels become x."""

    shape: tuple[int, ...]
    space: ModelSpace


def build_metric(config: Distance, images: Images) -> Metric:
    """The metric that a configuration names. UserError where LPIPS lacks its package or its file."""
    match config.name:
        case "l2":
            return l2
        case "l1":
            return l1
        case "pseudo_huber":
            return partial(pseudo_huber, c=ict_constant(images.shape) if config.constant is None else config.constant)
        case "huber":
            return partial(elementwise_huber, c=0.001 if config.constant is None else config.constant)
        case "lpips":
            assert config.weights is not None, "asked for by its description"
            return build_perceptual(config.weights, images.shape, images.space)
