"""Guidance by a scale s away from a lesser answer: F_lesser + s (F - F_lesser), so s = 1 is none.

The lesser answer is the network's own without a label (classifier-free guidance, Ho & Salimans 2022), that of a smaller
network without a label (EDM2, arXiv 2312.02696, section 3.3), or of a weaker one with it (autoguidance, 2406.02507).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sctrain.parameterization import Network
from sctrain.processes import per_sample


def guided_network(network: Network, scale: Tensor, no_label: int) -> Network:
    """`network`, guided by `scale` (B,) away from its own answer without a label; its log-weight is 0.

    It is evaluated once, on a batch of twice the size.
    """

    def guided(u: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        without = torch.full_like(labels, no_label)
        both, _ = network(torch.cat([u, u]), torch.cat([t, t]), torch.cat([labels, without]))
        F, F_none = both.chunk(2)
        return _away(F, F_none, scale), torch.zeros_like(t)

    return guided


def guided_by(network: Network, guide: Network, scale: Tensor, no_label: int | None) -> Network:
    """`network`, guided by `scale` (B,) away from the answer of `guide`; its log-weight is 0.

    The guide is told `no_label` in place of the label, or the label itself where that is None.
    """

    def guided(u: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        F, _ = network(u, t, labels)
        F_guide, _ = guide(u, t, labels if no_label is None else torch.full_like(labels, no_label))
        return _away(F, F_guide, scale), torch.zeros_like(t)

    return guided


def _away(F: Tensor, lesser: Tensor, scale: Tensor) -> Tensor:
    """F_lesser + s (F - F_lesser): (B, C, H, W), (B,) -> (B, C, H, W)."""
    wide = torch.promote_types(F.dtype, scale.dtype)  # not every PyTorch lets the weight have another dtype
    return torch.lerp(lesser.to(wide), F.to(wide), per_sample(scale, F).to(wide)).to(F.dtype)
