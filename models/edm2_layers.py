"""What the EDM2 U-Net is made of: what it is told, and its blocks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import attention
from models.edm2_options import EDM2Options
from models.execution import Execution
from models.layers import AUGMENTATION_LABELS, Conditioning, PositionalEmbedding, ToldBeside, resampled
from models.magnitude import SILU, MPConv, MPFourier, MPLinear, mp_cat, mp_silu, sum_factors, unit_size
from models.unet_plan import Place

LIMIT = 256.0  # of activations
RESIDUAL = 0.3  # share of a branch in its sum
KEPT, ADDED = sum_factors(RESIDUAL)


class MPCondition(ToldBeside):
    """Time, class and the rest of `told` to one vector per sample, in the dtype of t: (B,), (B,), ... -> (B, 4 C).

    What is told beside time and class is added to the embedding of time, with a gain that is zero at first.
    """

    def __init__(self, options: EDM2Options, told: Conditioning):
        super().__init__()
        width = options.channels
        self.num_classes = told.num_classes
        self.time = MPFourier(width) if options.name == "edm2" else PositionalEmbedding(width, options.time_period)
        self.slow = PositionalEmbedding(width)
        half = sum_factors(0.5)[0] if options.told_classes else 1.0
        self.noise = MPLinear(width, 4 * width, half)
        size = half * math.sqrt(told.num_classes)
        self.label = MPLinear(told.num_classes, 4 * width, size) if options.told_classes else None
        self.guidance = MPLinear(width, width, gained=True) if told.guided else None
        self.end = MPLinear(width, width, gained=True) if told.jumps else None
        self.augmentation = MPLinear(AUGMENTATION_LABELS, width, gained=True) if told.augmented else None

    def forward(
        self, t: Tensor, labels: Tensor, guidance: Tensor | None, end: Tensor | None, augmentation: Tensor | None
    ) -> Tensor:
        time = self.joined(self.time(t), self.slow, guidance, end, augmentation)
        if self.label is None:
            return mp_silu(self.noise(time))
        classes = F.one_hot(labels, self.num_classes + 1)[:, :-1].to(time.dtype)  # "no class" is zero
        return mp_silu(self.noise(time) + self.label(classes))


class Modulation(nn.Module):
    """How the condition changes a block's features: (B, O, H, W), (B, 4 C) -> (B, O, H, W)."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.gain = MPLinear(width, outputs, gained=True)

    def forward(self, y: Tensor, condition: Tensor) -> Tensor:
        return y * (self.gain(condition) + 1)[:, :, None, None]


class DoubleNorm(nn.Module):
    """pnorm(y) * pnorm(scale) + pnorm(shift), the adaptive double normalisation of sCM section 4.1.

    The scale comes from the first half of the condition, the shift from the second: as many weights as `Modulation`.
    With the `whole` both see all of it (edm2_sCM's networks).
    """

    def __init__(self, width: int, outputs: int, *, whole: bool):
        super().__init__()
        self.whole, seen = whole, width if whole else width // 2
        self.scale, self.shift = MPLinear(seen, outputs), MPLinear(seen, outputs)

    def forward(self, y: Tensor, condition: Tensor) -> Tensor:
        first, second = (condition, condition) if self.whole else condition.chunk(2, dim=1)
        scale, shift = (unit_size(x, 1)[:, :, None, None] for x in (self.scale(first), self.shift(second)))
        return torch.addcmul(shift, unit_size(y, 1), scale)


class Attention(nn.Module):
    """Self-attention of pixels, queries, keys and values of unit size, added to what it came from: (B, C, H, W)."""

    def __init__(self, channels: int, head_channels: int, execution: Execution):
        super().__init__()
        self.heads, self.execution = channels // head_channels, execution
        self.qkv = MPConv(channels, 3 * channels, 1)
        self.project = MPConv(channels, channels, 1, ADDED)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        y = unit_size(self.qkv(x).reshape(B, 3, self.heads, C // self.heads, H * W), 3)
        q, k, v = y.transpose(-1, -2).unbind(1)  # (B, heads, pixels, head_channels)
        mixed = attention(q, k, v, self.execution.attention)
        # In one layout, whichever way it was computed: dropout masks are drawn in the order of memory.
        mixed = mixed.transpose(-1, -2).contiguous().reshape(B, C, H, W)
        return torch.add(self.project(mixed), x, alpha=KEPT)


class Block(nn.Module):
    """Two convolutions and, at some resolutions, attention, each added to what it came from.

    An encoder's normalises what it is given; a decoder's is given features to append. Constant factors of sums and of
    mp_silu are in the `scale` of the convolution beside them.
    """

    def __init__(self, place: Place, options: EDM2Options, execution: Execution, *, decodes: bool):
        super().__init__()
        self.place, self.decodes = place, decodes
        inputs, outputs = place.inputs + place.appended, place.outputs
        self.skip = MPConv(inputs, outputs, 1) if inputs != outputs else None
        self.first = MPConv(inputs if decodes else outputs, outputs, 3, 1 / SILU)
        told = (4 * options.channels, outputs)
        self.modulation = (
            Modulation(*told) if options.name == "edm2" else DoubleNorm(*told, whole=options.whole_condition)
        )
        everywhere = options.dropout_below is None or place.resolution <= options.dropout_below
        self.dropout = nn.Dropout(options.dropout if everywhere else 0.0)
        self.second = MPConv(outputs, outputs, 3, ADDED / SILU)
        self.attention = Attention(outputs, options.head_channels, execution) if place.attends else None

    def forward(self, x: Tensor, condition: Tensor, appended: Tensor | None = None) -> Tensor:
        """(B, I, H, W), (B, 4 C), what to append (B, A, H, W) -> (B, O, H', W')."""
        x = resampled(x, self.place.resampling)
        if appended is not None:
            x = mp_cat(x, appended)
        if not self.decodes:
            x = unit_size(x if self.skip is None else self.skip(x), 1)
        y = self.modulation(self.first(F.silu(x)), condition)
        if self.decodes and self.skip is not None:
            x = self.skip(x)
        x = torch.add(self.second(self.dropout(F.silu(y))), x, alpha=KEPT)
        if self.attention is not None:
            x = self.attention(x)
        return x.clamp(-LIMIT, LIMIT)
