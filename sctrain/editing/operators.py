"""Invertible linear maps A of images: of some of their coefficients an edit knows the value, and keeps it (CM 2023,
appendix D).

Those with a matrix Q are orthogonal, and Q is computed in float64. Only its first column matters to an edit: the known
coefficient is the part of the image along it, and all the rest is to be generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LUMINANCE = (0.2989, 0.5870, 0.1140)  # of red, green and blue (ITU-R BT.601, as printed in CM 2023)


class Operator(Protocol):
    """A and its inverse. The dtype and the device are those of the argument."""

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> coefficients."""
        ...

    def inverse(self, coefficients: Tensor) -> Tensor:
        """Coefficients -> (B, C, H, W)."""
        ...


class Identity:
    """The coefficients are the pixels: inpainting."""

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def inverse(self, coefficients: Tensor) -> Tensor:
        return coefficients


class ColourTransform:
    """(B, 3, H, W) -> (B, 3, H, W): luminance (of a grey image p: p sum(w) / |w|) and two coordinates of colour."""

    def __init__(self) -> None:
        self._q = completed(torch.tensor(LUMINANCE, dtype=torch.float64))

    def __call__(self, x: Tensor) -> Tensor:
        return torch.einsum("blhw,lk->bkhw", x, self._q.to(x))

    def inverse(self, coefficients: Tensor) -> Tensor:
        return torch.einsum("bkhw,lk->blhw", coefficients, self._q.to(coefficients))


class PatchTransform:
    """(B, C, H, W) -> (B, C, p^2, H / p, W / p): `side` p times the mean of each p x p patch, then its details.

    H and W must be multiples of p; pixels of a patch are numbered row by row.
    """

    def __init__(self, side: int) -> None:
        assert side >= 1, side
        self.side = side
        self._q = completed(torch.ones(side * side, dtype=torch.float64))

    def __call__(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        p = self.side
        patches = x.reshape(B, C, H // p, p, W // p, p).permute(0, 1, 3, 5, 2, 4).reshape(B, C, p * p, H // p, W // p)
        return torch.einsum("bcmhw,mk->bckhw", patches, self._q.to(x))

    def inverse(self, coefficients: Tensor) -> Tensor:
        B, C, _, h, w = coefficients.shape
        p = self.side
        patches = torch.einsum("bckhw,mk->bcmhw", coefficients, self._q.to(coefficients))
        return patches.reshape(B, C, p, p, h, w).permute(0, 1, 4, 2, 5, 3).reshape(B, C, h * p, w * p)


@dataclass(frozen=True)
class PerChannel:
    """An operator on pixels for images whose channel c is (pixel - mean) / scale[c].

    The mean does not matter: a replacement of coefficients is the same with or without a constant.
    """

    operator: Operator
    scale: Sequence[float]  # one for each channel, or one for all

    def __call__(self, x: Tensor) -> Tensor:
        return self.operator(x * self._factors(x))

    def inverse(self, coefficients: Tensor) -> Tensor:
        x = self.operator.inverse(coefficients)
        return x / self._factors(x)

    def _factors(self, x: Tensor) -> Tensor:
        return torch.tensor(tuple(self.scale), dtype=x.dtype, device=x.device).reshape(-1, 1, 1)


def completed(first: Tensor) -> Tensor:
    """An orthogonal matrix (n, n) in float64 whose first column points along `first` (n,), with first[0] > 0."""
    assert first[0] > 0 and first.dtype == torch.float64
    columns = torch.eye(len(first), dtype=torch.float64)
    columns[:, 0] = first
    q, r = torch.linalg.qr(columns)
    return q * r.diagonal().sign()
