"""Layers with exact, unrecorded tangents (see tangent.py). `t_` names a tangent; B batch, N tokens, W width."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.tangent import add_products, carried

_EPS = 1e-6


def _linear_rule(_, primals, tangents):
    return F.linear(tangents[0], primals[1])


_linear = carried(F.linear, _linear_rule)


class Linear(nn.Linear):
    """`nn.Linear` on dual tensors. The parameters themselves carry no tangent."""

    def forward(self, input: Tensor) -> Tensor:
        return _linear(input, self.weight, self.bias) if self.bias is not None else _linear(input, self.weight)


def _silu_rule(_, primals, tangents):
    gate = torch.sigmoid(primals[0])
    return tangents[0] * (gate * (1 + primals[0] * (1 - gate)))


silu = carried(F.silu, _silu_rule)


def _inverse_rms(x: Tensor) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPS)


def _pixel_norm_value(x: Tensor) -> Tensor:
    return x * _inverse_rms(x)


def _pixel_norm_rule(y, primals, tangents):
    (x,), (t_x,) = primals, tangents
    return _inverse_rms(x) * (t_x - y * (y * t_x).mean(-1, keepdim=True))


# x / rms(x) over the last dimension: the `pnorm` of sCM section 4.1, without parameters.
pixel_norm = carried(_pixel_norm_value, _pixel_norm_rule)


def _scale_shift_value(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, x, scale)


def _scale_shift_rule(_, primals, tangents):
    (x, scale, _), (t_x, t_scale, t_shift) = primals, tangents
    product = add_products((t_x, scale), (x, t_scale))
    return product if t_shift is None else product + t_shift


# x * scale + shift, broadcast; every operand may carry a tangent.
scale_shift = carried(_scale_shift_value, _scale_shift_rule)


class PositionalEmbedding(nn.Module):
    """Sines and cosines of t, at frequencies from 1 down to 1/period rad per unit of t: (B,) -> (B, W), dtype of t.

    Slow on purpose: high frequencies make dF/dt large and noisy (sCM section 4.1).
    """

    def __init__(self, width: int, period: float = 100.0):
        super().__init__()
        assert width % 2 == 0, "sines and cosines come in pairs"
        self.width, self.period = width, period

    def forward(self, t: Tensor) -> Tensor:
        half = self.width // 2
        exponents = torch.arange(half, device=t.device, dtype=t.dtype) / max(half - 1, 1)
        angles = t[:, None] * torch.exp(-math.log(self.period) * exponents)
        return math.sqrt(2) * torch.cat([angles.cos(), angles.sin()], dim=-1)


class ConditionEmbedding(nn.Module):
    """Time and class (and later the guidance scale) to one vector per sample: (B,), (B,) -> (B, W).

    Label `num_classes` means "no class": what label dropout trains and guidance uses.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.time = PositionalEmbedding(width)
        self.hidden = Linear(width, width)
        self.out = Linear(width, width)
        self.label = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.label.weight, std=0.5)

    def forward(self, t: Tensor, labels: Tensor) -> Tensor:
        time = self.time(t).to(self.hidden.weight.dtype)
        return silu(self.out(silu(self.hidden(time))) + self.label(labels))


class WeightingHead(nn.Module):
    """w(t) of the adaptive weighting e^w L - w (sCM section 4.2), zero at first: (B,) -> (B,) in float32 or better."""

    def __init__(self, width: int):
        super().__init__()
        self.time = PositionalEmbedding(width)
        self.out = Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, t: Tensor) -> Tensor:
        features = self.time(t)
        return self.out(features.to(self.out.weight.dtype)).squeeze(-1).to(t.dtype)
