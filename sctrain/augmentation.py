"""EDM's non-leaky augmentation (Karras et al. 2022, appendix F.2): the network is told how its image was transformed.

Everything about a transformation is in its label, nine numbers, zero for none; so what a network draws when it is told
zero, or nothing, is untransformed. In the order in which they act:

    0     x-flip                 a ~ U{0, 1}
    1     y-flip                 a ~ U{0, 1}
    2     scaling                by 2^(0.2 a), a ~ N(0, 1)
    3, 4  rotation               cos a - 1, sin a of a ~ U(-pi, pi)
    5, 6  anisotropic scaling    by 2^(0.2 a) along a direction b ~ U(-pi, pi) and 2^(-0.2 a) across: a cos 2b, a sin 2b
    7, 8  translation            by a/8 of the width and of the height, a ~ N(0, 1)

Each acts with the configured probability, only the x-flip always draws its coin. The paper's label of the anisotropy is
(a cos b, a sin b), which (a, b) and (-a, b + pi) share although one stretches where the other shrinks; of the doubled
angle it identifies the transformation.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sctrain.randomness import SampleGenerator

_FACTOR_LOG = 0.2 * math.log(2)  # of both scalings, per unit of the label
_SHIFT = 1 / 8  # of the image's side, per unit of the label
_WHOLE = 1e-4  # pixels: a shift this near to a whole number is one


def draw_labels(generator: SampleGenerator, probability: float) -> Tensor:
    """One label per sample, float32 (B, 9). Every sample draws alike, whatever acts on it."""
    coins = [generator.uniform() for _ in range(6)]  # which act; the x-flip's is its value
    flip = (generator.uniform() < 0.5).double()
    angle, direction = (math.pi * (2 * generator.uniform().double() - 1) for _ in range(2))
    scale, stretch, right, down = (generator.normal().double() for _ in range(4))
    acts = [(coin < probability).double() for coin in coins[1:]]
    columns = [
        (coins[0] < 0.5).double(),
        acts[0] * flip,
        acts[1] * scale,
        acts[2] * (angle.cos() - 1),
        acts[2] * angle.sin(),
        acts[3] * stretch * (2 * direction).cos(),
        acts[3] * stretch * (2 * direction).sin(),
        acts[4] * right,
        acts[4] * down,
    ]
    return torch.stack(columns, dim=1).float()


def transformed(images: Tensor, labels: Tensor) -> Tensor:
    """The images (B, C, H, W) under the transformations of their labels (B, 9), which stay on the CPU.

    Beyond its edge an image is continued by its mirror image. Flips and translations by whole pixels move pixels and
    change none; anything else interpolates (bicubic), and averages over the area of a pixel where it shrinks.
    """
    height, width = images.shape[-2:]
    labels = labels.double()
    sources = source_matrices(labels)
    shifts = labels[:, 7:] * torch.tensor([width, height]) * _SHIFT  # in pixels
    upright = (sources.diagonal(dim1=1, dim2=2).abs() == 1).all(dim=1) & (sources[:, 0, 1] == 0)
    moved = upright & ((shifts - shifts.round()).abs() < _WHOLE).all(dim=1)
    samples = _samples_per_side(labels).masked_fill(moved, 0)
    out = torch.empty_like(images)
    for count in samples.unique().tolist():  # 0: nothing between pixels is asked for
        chosen = (samples == count).nonzero().squeeze(1)
        move = _pixels if count == 0 else _interpolated
        on_device = chosen.to(images.device)
        out[on_device] = move(images[on_device], sources[chosen], shifts[chosen], count)
    return out


def source_matrices(labels: Tensor) -> Tensor:
    """Where a pixel comes from: (B, 9) -> (B, 2, 2), from (x, y) of the transformed image, shift undone, to the source.

    With A = exp(c [[p, q], [q, -p]]) = cosh(cr) + sinh(cr)/r [[p, q], [q, -p]], r^2 = p^2 + q^2, the transformation is
    A R S F (flips first), so its inverse is F S^-1 R^T A^-1.
    """
    flip_x, flip_y, scale, cos, sin, p, q = labels[:, :7].unbind(dim=1)
    cos, r = cos + 1, torch.hypot(p, q)
    slope = torch.where(r > 0, (_FACTOR_LOG * r).sinh() / r, 0)
    even = (_FACTOR_LOG * r).cosh()
    unstretch = _matrix(even - slope * p, -slope * q, -slope * q, even + slope * p)
    unrotate = _matrix(cos, sin, -sin, cos)
    zero, unscale = torch.zeros_like(scale), (-_FACTOR_LOG * scale).exp()
    unflip = _matrix(unscale * (1 - 2 * flip_x), zero, zero, unscale * (1 - 2 * flip_y))
    return _product(_product(unflip, unrotate), unstretch)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Of matrices (..., 2, 2), element by element: a sample's bits do not depend on the batch it is in."""
    return (a[..., :, :, None] * b[..., None, :, :]).sum(dim=-2)


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """[[a, b], [c, d]] per sample."""
    return torch.stack([a, b, c, d], dim=1).reshape(-1, 2, 2)


def _samples_per_side(labels: Tensor) -> Tensor:
    """How many points per side of a pixel are averaged: the most source pixels that one step of a pixel passes."""
    stride = (_FACTOR_LOG * (torch.hypot(labels[:, 5], labels[:, 6]) - labels[:, 2])).exp()
    return (stride - 1e-6).ceil().long().clamp(min=1)


def _pixels(images: Tensor, sources: Tensor, shifts: Tensor, _: int) -> Tensor:
    """By indexing alone: flips and translations by whole pixels."""
    indices = []
    for axis, size in ((1, images.shape[-2]), (0, images.shape[-1])):  # rows, then columns
        centred = torch.arange(size) - (size - 1) / 2 - shifts[:, axis, None].round()
        index = (sources[:, axis, axis, None] * centred + (size - 1) / 2).round().long() % (2 * size)
        indices.append(torch.where(index < size, index, 2 * size - 1 - index).to(images.device))
    rows, columns = indices
    samples = torch.arange(len(images), device=images.device)[:, None, None]
    return images[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _interpolated(images: Tensor, sources: Tensor, shifts: Tensor, count: int) -> Tensor:
    """At count x count points of every pixel, averaged."""
    height, width = images.shape[-2:]
    y, x = ((torch.arange(size * count) + 0.5) / count - size / 2 for size in (height, width))
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).double()  # (rows, columns, 2), centre at 0
    points = _product(sources[:, None, None], (points - shifts[:, None, None])[..., None]).squeeze(-1)
    grid = (points * 2 / torch.tensor([width, height])).to(images.device, images.dtype)
    dense = F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return F.avg_pool2d(dense, count) if count > 1 else dense
