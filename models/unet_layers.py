"""What the U-Nets before EDM2 are made of: what they are told, resampling, modulation, attention, the block."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import attention
from models.execution import Execution
from models.layers import (
    Conditioning,
    Held,
    PositionalEmbedding,
    ToldBeside,
    WideLinear,
    pixel_norm,
    resampled,
    unit_modulation,
)
from models.unet_options import Form
from models.unet_plan import Place, Resampling

Layer = TypeVar("Layer", bound=nn.Linear | nn.Conv2d)
PERIOD = 10_000.0  # of the slowest positional frequency to the fastest
FOURIER_SCALE = 16.0  # turns per unit of c_noise
CONDITION_FACTOR = 4  # the condition has that many times `channels` numbers


# --- What the network is told ---------------------------------------------------------------------------------------


class NoiseEmbedding(nn.Module):
    """Sines and cosines of c_noise, at frequencies that fall evenly on a logarithmic scale: (B,) -> (B, W)."""

    def __init__(self, width: int, form: Form, scale: float | None):
        super().__init__()
        self.pairs, self.form, self.scale = width // 2, form, scale

    def frequencies(self, c_noise: Tensor) -> Tensor:
        """(W/2,), rad per unit of c_noise, in its dtype."""
        steps = torch.arange(self.pairs, device=c_noise.device, dtype=c_noise.dtype)
        exponents = steps / max(self.pairs - self.form.ends_at_period, 1)
        return (self.scale or 1.0) * torch.exp(-math.log(PERIOD) * exponents)

    def forward(self, c_noise: Tensor) -> Tensor:
        angles = c_noise[:, None] * self.frequencies(c_noise)
        parts = (angles.sin(), angles.cos()) if self.form.sines_first else (angles.cos(), angles.sin())
        return torch.cat(parts, dim=-1)


class FourierEmbedding(NoiseEmbedding, Held):
    """The same at random frequencies."""

    def __init__(self, width: int, form: Form, scale: float | None):
        super().__init__(width, form, scale)
        self.turns = nn.Parameter((scale or FOURIER_SCALE) * torch.randn(width // 2))  # per unit of c_noise

    def frequencies(self, c_noise: Tensor) -> Tensor:
        return 2 * math.pi * self.held(self.turns).to(c_noise.dtype)


class UNetCondition(ToldBeside):
    """Noise, class and the rest of `told` to one vector per sample, in the dtype of c_noise: (B,), ... -> (B, 4 C)."""

    def __init__(self, channels: int, form: Form, time_scale: float | None, told: Conditioning):
        super().__init__()
        embedded, width = form.embedding_factor * channels, CONDITION_FACTOR * channels
        self.form = form
        self.time = {"positional": NoiseEmbedding, "fourier": FourierEmbedding}[form.embedding](
            embedded, form, time_scale
        )
        self.slow = PositionalEmbedding(embedded)
        self.hidden = drawn(WideLinear(embedded, width), form)
        self.out = drawn(WideLinear(width, width), form)
        self.label = nn.Embedding(told.num_classes + 1, embedded if form.labels_early else width)
        if form.glorot:
            nn.init.normal_(self.label.weight, std=0.5)
        self.silent_layers(embedded, told)

    def forward(
        self, c_noise: Tensor, labels: Tensor, guidance: Tensor | None, end: Tensor | None, augmentation: Tensor | None
    ) -> Tensor:
        total = self.joined(self.time(c_noise), self.slow, guidance, end, augmentation)
        if self.form.labels_early:
            total = total + self.label(labels)
        total = self.out(F.silu(self.hidden(total)))
        return F.silu(total if self.form.labels_early else total + self.label(labels))


# --- Layers ---------------------------------------------------------------------------------------------------------


def drawn(layer: Layer, form: Form, gain: float = 1.0) -> Layer:
    """The layer with its initial weights; a gain of zero silences it."""
    if gain == 0:
        nn.init.zeros_(layer.weight)
    elif form.glorot:
        nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None and (gain == 0 or form.glorot):
        nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels: int, form: Form) -> nn.GroupNorm:
    """In at most 32 groups of at least four channels, with weights."""
    groups = max(count for count in range(1, min(32, channels // 4) + 1) if channels % count == 0)
    return nn.GroupNorm(groups, channels, form.eps)


class Resample(nn.Module):
    """Halves or doubles the resolution behind a separable filter: (B, C, H, W) -> (B, C, H', W')."""

    kernel: Tensor | None
    how: Resampling

    def __init__(self, how: Resampling, taps: tuple[int, ...], *, pads: bool = True):
        super().__init__()
        self.how, self.padding = how, (len(taps) - 1) // 2 if pads else 0
        line = torch.tensor(taps, dtype=torch.float32) / sum(taps)
        kernel = None if len(taps) == 2 else torch.outer(line, line)
        self.register_buffer("kernel", kernel, persistent=False)  # None: the means of 2 x 2 pixels, their copies

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "keep" or self.kernel is None:
            return resampled(x, self.how)
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, -1, -1)
        if self.how == "down":
            return F.conv2d(x, kernel, stride=2, padding=self.padding, groups=channels)
        return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=self.padding, groups=channels)


class ImagePyramid(nn.Module):
    """The image, or what the level above made of it, for the next coarser level: (B, I, H, W) -> (B, O, H/2, W/2).

    The convolution's margin is one filter wide: the filter sees no edge.
    """

    def __init__(self, inputs: int, outputs: int, form: Form):
        super().__init__()
        self.convolution = drawn(nn.Conv2d(inputs, outputs, 3, padding=1 + (len(form.filter) - 1) // 2), form)
        self.shrink = Resample("down", form.filter, pads=False)

    def forward(self, image: Tensor) -> Tensor:
        return self.shrink(self.convolution(image))


class Modulation(nn.Module):
    """Normalises features as the condition says: (B, O, H, W), (B, 4 C) -> (B, O, H, W).

    shift: norm(y + b), as published for DDPM++ and NCSN++; scale_shift: norm(y) (1 + s) + b, AdaGN;
    double_norm: norm(y) pnorm(s) + pnorm(b), sCM section 4.1.
    """

    def __init__(self, width: int, outputs: int, form: Form):
        super().__init__()
        self.kind, self.norm = form.modulation, group_norm(outputs, form)
        if self.kind == "double_norm":
            self.affine = unit_modulation(width, outputs)
        else:
            self.affine = drawn(nn.Linear(width, outputs * (2 if self.kind == "scale_shift" else 1)), form)

    def forward(self, y: Tensor, condition: Tensor) -> Tensor:
        told = self.affine(condition)
        if self.kind == "shift":
            return self.norm(y + told[:, :, None, None])
        scale, shift = told.chunk(2, dim=1)
        scale, shift = (scale + 1, shift) if self.kind == "scale_shift" else (pixel_norm(scale), pixel_norm(shift))
        return torch.addcmul(shift[:, :, None, None], self.norm(y), scale[:, :, None, None])


class Attention(nn.Module):
    """The branch of self-attention of pixels: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, heads: int, form: Form, execution: Execution):
        super().__init__()
        self.heads, self.execution, self.norm = heads, execution, group_norm(channels, form)
        self.qkv = drawn(nn.Conv2d(channels, 3 * channels, 1), form, math.sqrt(0.2) if form.glorot else 1.0)
        self.project = drawn(nn.Conv2d(channels, channels, 1), form, form.last_gain)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W).transpose(-1, -2)
        q, k, v = qkv.unbind(1)  # (B, heads, pixels, channels of a head)
        mixed = attention(q, k, v, self.execution.attention)
        return self.project(mixed.transpose(-1, -2).reshape(B, C, H, W))


class Block(nn.Module):
    """Two convolutions and, in some places, attention, each added to what it came from."""

    def __init__(self, place: Place, width: int, dropout: float, heads: int, form: Form, execution: Execution):
        super().__init__()
        inputs, outputs = place.inputs + place.appended, place.outputs
        self.place, self.factor = place, form.sum_factor
        self.resample = Resample(place.resampling, form.filter)
        self.norm, self.first = group_norm(inputs, form), drawn(nn.Conv2d(inputs, outputs, 3, padding=1), form)
        self.modulation, self.dropout = Modulation(width, outputs, form), nn.Dropout(dropout)
        self.second = drawn(nn.Conv2d(outputs, outputs, 3, padding=1), form, form.last_gain)
        projects = inputs != outputs or (form.resampled_skip and place.resampling != "keep")
        self.skip = drawn(nn.Conv2d(inputs, outputs, 1), form) if projects else None
        self.attention = Attention(outputs, heads, form, execution) if place.attends else None

    def forward(self, x: Tensor, condition: Tensor, appended: Tensor | None = None) -> Tensor:
        """(B, I, H, W), (B, 4 C), what to append (B, A, H, W) -> (B, O, H', W')."""
        if appended is not None:
            x = torch.cat([x, appended], dim=1)
        y = self.first(self.resample(F.silu(self.norm(x))))
        y = self.second(self.dropout(F.silu(self.modulation(y, condition))))
        x = self.resample(x)
        x = self._sum(x if self.skip is None else self.skip(x), y)
        return x if self.attention is None else self._sum(x, self.attention(x))

    def _sum(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + branch if self.factor == 1 else (x + branch) * self.factor
