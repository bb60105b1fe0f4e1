"""What an edit knows of an image: the coefficients of an operator A outside the mask Omega (CM 2023, appendix D)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sctrain.editing.operators import ColourTransform, Identity, Operator, PatchTransform, PerChannel

CLIPPING_ROUNDS = 1000  # at most; a dozen where few pixels are beyond black or white


@dataclass(frozen=True)
class Measurement:
    """A and Omega; `unknown` (bool, of a shape that broadcasts to A x) is true where the value is to be generated."""

    operator: Operator
    unknown: Tensor

    def projected(self, y: Tensor) -> Tensor:
        """A^-1 [(A y) (1 - Omega)]: y without what is unknown, (B, C, H, W)."""
        coefficients = self.operator(y)
        return self.operator.inverse(coefficients.masked_fill(self._unknown(y), 0))

    def replaced(self, x: Tensor, y: Tensor) -> Tensor:
        """A^-1 [(A y) (1 - Omega) + (A x) Omega]: x with all that is known of y, (B, C, H, W)."""
        return self.operator.inverse(torch.where(self._unknown(x), self.operator(x), self.operator(y)))

    def within(self, x: Tensor, y: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """X, which has what is known of y, between `low` and `high` (1, C, 1, 1): black and white, which bound y.

        Clipping alone would change a known mean or luminance. Both conditions are convex and hold for y, so clipping
        and replacing in turn converges to a picture for which both do; a quarter of an 8-bit level may be left.
        """
        clipped = x.clamp(low, high)
        for _ in range(CLIPPING_ROUNDS):
            if bool(((x - clipped).abs() <= (high - low) / (4 * 255)).all()):
                break
            x = self.replaced(clipped, y)
            clipped = x.clamp(low, high)
        return clipped

    def deviation(self, x: Tensor, y: Tensor) -> float:
        """The largest difference of a known coefficient, in units of the pixels."""
        unit = self.operator(torch.ones_like(x))  # of an image that is 1 everywhere
        apart = (self.operator(x) - self.operator(y)) / unit
        return apart.masked_fill(self._unknown(x), 0).abs().max().item()

    def _unknown(self, like: Tensor) -> Tensor:
        return self.unknown.to(like.device)


def inpainting(missing: Tensor) -> Measurement:
    """`missing` (H, W) is true on the pixels to generate; all others are known."""
    return Measurement(Identity(), missing.bool())


def colorization(scale: Sequence[float] = (1.0,)) -> Measurement:
    """The luminance of every pixel is known; `scale` is what a channel's unit is in pixels (see PerChannel)."""
    return Measurement(PerChannel(ColourTransform(), scale), torch.tensor([False, True, True]).reshape(3, 1, 1))


def superresolution(factor: int) -> Measurement:
    """The mean of every factor x factor patch is known, in each channel."""
    unknown = torch.arange(factor * factor) > 0
    return Measurement(PatchTransform(factor), unknown.reshape(-1, 1, 1))
