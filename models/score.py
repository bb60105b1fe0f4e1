"""A diffusion model of what another network draws, for score distillation (sCM appendix D)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers import WeightingHead

BALANCE_WIDTH = 128


class Score(nn.Module):
    """`network` with a second weight of times, w', by which its distance from the teacher is balanced."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.balance = network, WeightingHead(BALANCE_WIDTH)

    def forward(
        self, u: Tensor, t: Tensor, labels: Tensor, guidance: Tensor | None, balanced_t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, C, H, W), (B,), (B,), (B,), (B,) -> F (B, C, H, W), and w(t) beside w'(balanced_t): (B, 2)."""
        F, log_weight = self.network(u, t, labels, guidance)
        return F, torch.stack([log_weight, self.balance(balanced_t)], dim=1)
