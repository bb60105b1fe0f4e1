"""The hinge loss between a network whose images are to look real and a discriminator that tells them from real ones.

    the network's:          -D(fake)
    the discriminator's:    max(0, 1 - D(real)) + max(0, 1 + D(fake))

each the mean over the discriminator's patches, per sample (B,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sctrain.objectives.base import Judge


def realism(judge: Judge, x: Tensor, labels: Tensor) -> Tensor:
    """-D of images x (B, C, H, W) of unit variance."""
    return -judge(x, labels).mean(dim=1)


def judgement(judge: Judge, real: Tensor, fake: Tensor, labels: Tensor) -> Tensor:
    """What the discriminator is trained on; `fake` without its graph. Both go through it as one batch."""
    logits = judge(torch.cat([real, fake.detach()]), torch.cat([labels, labels]))
    of_real, of_fake = logits[: len(real)], logits[len(real) :]
    return ((1 - of_real).clamp_min(0) + (1 + of_fake).clamp_min(0)).mean(dim=1)
