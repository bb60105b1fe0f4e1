"""The EDM2 U-Net (Karras et al. 2024), written from the mathematics, and its form for sCM (Lu & Song 2024)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from models.edm2_layers import Block, MPCondition
from models.edm2_options import EDM2Options
from models.execution import Execution
from models.layers import Conditioning, WeightingHead
from models.magnitude import MPConv, MPFourier, MPLinear
from models.tangent.dual import value_of

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
        _check(options, height, width)
        self.execution, self.head_dim = execution, options.head_channels
        self.condition = MPCondition(options, told)
        self.embed = MPConv(channels + 1, options.channels, 3)
        self.encoder, skips = _encoder(options, height, execution)
        self.decoder = _decoder(options, height, execution, skips)
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
            appended = [kept.pop()] if block.appends else []
            x = self.execution.run(block, x, condition, *appended)
        return self.head(x).to(u.dtype), self.weighting(value_of(t))  # nobody asks for the weight's tangent


def _encoder(options: EDM2Options, height: int, execution: Execution) -> tuple[nn.ModuleList, list[int]]:
    """Blocks from fine to coarse, and the channels of what they leave to the decoder, the embedded image first."""
    blocks, skips = [], [options.channels]
    for level, multiplier in enumerate(options.multipliers):
        make = partial(Block, options=options, execution=execution, decodes=False, resolution=height >> level)
        attends = height >> level in options.attention
        if level:
            blocks.append(make(skips[-1], skips[-1], resampling="down"))
            skips.append(skips[-1])
        for _ in range(options.blocks):
            blocks.append(make(skips[-1], options.channels * multiplier, attends=attends))
            skips.append(options.channels * multiplier)
    return nn.ModuleList(blocks), skips


def _decoder(options: EDM2Options, height: int, execution: Execution, skips: list[int]) -> nn.ModuleList:
    """Blocks from coarse to fine; those that do not begin a resolution take what the encoder left, the last first."""
    blocks, left, channels = [], list(skips), skips[-1]
    for level, multiplier in reversed(list(enumerate(options.multipliers))):
        make = partial(Block, options=options, execution=execution, decodes=True, resolution=height >> level)
        attends = height >> level in options.attention
        if level == len(options.multipliers) - 1:
            blocks += [make(channels, channels, attends=attends), make(channels, channels)]
        else:
            blocks.append(make(channels, channels, resampling="up"))
        for _ in range(options.blocks + 1):
            blocks.append(make(channels, options.channels * multiplier, appended=left.pop(), attends=attends))
            channels = options.channels * multiplier
    return nn.ModuleList(blocks)


def _check(options: EDM2Options, height: int, width: int) -> None:
    """ValueError where images of this size do not fit."""
    halvings = len(options.multipliers) - 1
    if height % 2**halvings or width % 2**halvings:
        raise ValueError(
            f"network.multipliers halves images of {height}x{width} {halvings} times; give it fewer levels"
        )
    for level, multiplier in enumerate(options.multipliers):
        channels = options.channels * multiplier
        if (height >> level) in options.attention and channels % options.head_channels:
            raise ValueError(
                f"network.head_channels {options.head_channels} does not divide the {channels} channels "
                f"at resolution {height >> level}"
            )
