"""Classifier-free guidance (Ho & Salimans 2022) by a scale s: F_none + s (F_label - F_none), so s = 1 is none."""

from collections.abc import Callable

import torch
from torch import Tensor

from sctrain.processes import per_sample


def guided(
    network: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    u: Tensor,
    t: Tensor,
    labels: Tensor,
    scale: Tensor,
    no_label: int,
) -> Tensor:
    """F (B, C, H, W) at (u, t, labels), guided by `scale` (B,) away from the network's own answer without a label."""
    without = torch.full_like(labels, no_label)
    both, _ = network(torch.cat([u, u]), torch.cat([t, t]), torch.cat([labels, without]))
    F, F_none = both.chunk(2)
    wide = torch.promote_types(F.dtype, scale.dtype)  # not every PyTorch lets the weight have another dtype
    return torch.lerp(F_none.to(wide), F.to(wide), per_sample(scale, F).to(wide)).to(F.dtype)
