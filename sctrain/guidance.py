"""Classifier-free guidance (Ho & Salimans 2022) by a scale s: F_none + s (F_label - F_none), so s = 1 is none."""

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
        wide = torch.promote_types(F.dtype, scale.dtype)  # not every PyTorch lets the weight have another dtype
        return torch.lerp(F_none.to(wide), F.to(wide), per_sample(scale, F).to(wide)).to(F.dtype), torch.zeros_like(t)

    return guided
