"""The EDM2 U-Net (Karras et al. 2024), written from the mathematics, and its form for sCM (Lu & Song 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.edm2_layers import Block, MPCondition
from models.edm2_options import EDM2Options
from models.execution import Execution
from models.layers import Conditioning, WeightingHead
from models.magnitude import MPConv, MPFourier, MPLinear
from models.tangent.dual import value_of
from models.unet_plan import check_fit, planned

WEIGHTING_WIDTH = 128


class UncertaintyHead(nn.Module):
    """w(t) = -u(t) of EDM2's learned uncertainty, a loss of L e^-u + u: (B,) -> (B,), in the dtype of t.

    Of unit size, like all layers of this network: enough for u, the logarithm of a loss near 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.time, self.out = MPFourier(WEIGHTING_WIDTH), MPLinear(WEIGHTING_WIDTH, 1)

    def forward(self, t: Tensor) -> Tensor:
        return self.out(self.time(t)).squeeze(-1)


class EDM2(nn.Module):
    """F(u, c_noise, label) and w. `u` is x_t / sigma_data, of unit variance."""

    def __init__(
        self,
        options: EDM2Options,
        channels: int,
        height: int,
        width: int,
        told: Conditioning,
        execution: Execution,
    ):
        super().__init__()
        shape = (options.channels, options.multipliers, options.blocks, options.attention)
        plan = planned(height, *shape, middle=height >> (len(options.multipliers) - 1) in options.attention)
        check_fit(plan, options.multipliers, height, width, options.head_channels)
        self.execution, self.head_dim = execution, options.head_channels
        self.condition = MPCondition(options, told)
        self.embed = MPConv(channels + 1, options.channels, 3)
        self.encoder = nn.ModuleList(Block(place, options, execution, decodes=False) for place in plan.encoder)
        self.decoder = nn.ModuleList(Block(place, options, execution, decodes=True) for place in plan.decoder)
        self.head = MPConv(options.channels * options.multipliers[0], channels, 3, gained=True)
        # sCM's weight nears the logarithm of the number of pixels, which a head of unit size does not reach.
        self.weighting = UncertaintyHead() if options.name == "edm2" else WeightingHead(WEIGHTING_WIDTH)

    def forward(
        self,
        u: Tensor,
        t: Tensor,
        labels: Tensor,
        guidance: Tensor | None = None,
        end: Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, C, H, W), 4 x (B,), (B, 9) -> F (B, C, H, W) and log-weight (B,), in the dtype of `u`.

        `t` is what the network is told of the noise. The weights' dtype rules inside; what depends on t alone keeps the
        dtype of `t`.
        """
        dtype = self.head.weight.dtype
        condition = self.condition(t, labels, guidance, end, augmentation).to(dtype)
        x = u.to(dtype)
        ones = torch.ones(x[:, :1].shape, dtype=dtype, device=x.device)  # in place of biases
        x = self.embed(torch.cat([x, ones], dim=1))
        kept = [x]
        for block in self.encoder:
            x = self.execution.run(block, x, condition)
            kept.append(x)
        for block in self.decoder:
            appended = [kept.pop()] if block.place.appended else []
            x = self.execution.run(block, x, condition, *appended)
        return self.head(x).to(u.dtype), self.weighting(value_of(t))  # nobody asks for the weight's tangent
