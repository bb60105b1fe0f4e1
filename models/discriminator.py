"""A discriminator: how real an image of a class looks, patch by patch and at several scales. Trained from nothing.

No layer mixes the samples of a batch, so what one of them is told does not depend on the others.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_SIDE = 4  # pixels of the coarsest scale
MOST_SCALES = 3


class Discriminator(nn.Module):
    """Convolutions on the image and on halved copies of it, each with a projection of the class (Miyato & Koyama)."""

    def __init__(self, width: int, channels: int, height: int, image_width: int, num_classes: int):
        super().__init__()
        scales = 1 + max(0, int(math.log2(min(height, image_width) / LEAST_SIDE)))
        self.scales = nn.ModuleList(_Scale(width, channels, num_classes) for _ in range(min(scales, MOST_SCALES)))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """(B, C, H, W) of unit variance, (B,) in [0, num_classes], the last meaning none -> logits (B, patches)."""
        x, logits = x.to(next(self.parameters()).dtype), []
        for number, scale in enumerate(self.scales):
            logits.append(scale(F.avg_pool2d(x, 2**number) if number else x, labels))
        return torch.cat(logits, dim=1).float()


class _Scale(nn.Module):
    def __init__(self, width: int, channels: int, num_classes: int):
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
                nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            ]
        )
        self.verdict = nn.Conv2d(2 * width, 1, 1)
        self.label = nn.Embedding(num_classes + 1, 2 * width)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
        of_class = (x * self.label(labels)[:, :, None, None]).sum(dim=1) / math.sqrt(x.shape[1])
        return (self.verdict(x).squeeze(1) + of_class).flatten(1)
