"""The EDM2 U-Net once more as plain PyTorch functions, with nothing of ours: what our forward is held against."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.edm2 import EDM2
from models.edm2_layers import Attention, Block, DoubleNorm, Modulation
from models.magnitude import MPConv, MPFourier, MPLinear


def normalize(x: Tensor, dim: tuple[int, ...]) -> Tensor:
    """x / (1e-4 + rms(x))."""
    return x / (1e-4 + x.square().mean(dim, keepdim=True).sqrt())


def silu(x: Tensor) -> Tensor:
    return F.silu(x) / 0.596


def add(a: Tensor, b: Tensor, t: float = 0.3) -> Tensor:
    return torch.lerp(a, b, t) / math.sqrt((1 - t) ** 2 + t**2)


def product(layer: MPConv | MPLinear, x: Tensor) -> Tensor:
    """Without the constant factors that the layer has taken over from sums and activations."""
    weight = normalize(layer.weight, tuple(range(1, layer.weight.ndim))) / math.sqrt(layer.weight[0].numel())
    if layer.gain is not None:
        weight = weight * layer.gain
    return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


def plain_edm2(network: EDM2, u: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """F with the network's own weights: (B, C, H, W), (B,), (B,) -> (B, C, H, W)."""
    condition = _condition(network, t, labels)
    x = product(network.embed, torch.cat([u, torch.ones_like(u[:, :1])], dim=1))
    kept = [x]
    for block in network.encoder:
        x = _block(block, x, condition, None)
        kept.append(x)
    for block in network.decoder:
        assert isinstance(block, Block)
        x = _block(block, x, condition, kept.pop() if block.place.appended else None)
    return product(network.head, x)


def _condition(network: EDM2, t: Tensor, labels: Tensor) -> Tensor:
    told = network.condition
    if isinstance(told.time, MPFourier):
        time = math.sqrt(2) * torch.cos(2 * math.pi * (t[:, None] * told.time.frequencies + told.time.phases))
    else:
        half = told.time.width // 2
        angles = t[:, None] * torch.exp(-math.log(100.0) * torch.arange(half, device=t.device) / (half - 1))
        time = math.sqrt(2) * torch.cat([angles.cos(), angles.sin()], -1)
    assert told.label is not None
    classes = F.one_hot(labels, told.num_classes).to(t.dtype) * math.sqrt(told.num_classes)
    return silu(add(product(told.noise, time), product(told.label, classes), 0.5))


def _block(block: torch.nn.Module, x: Tensor, condition: Tensor, appended: Tensor | None) -> Tensor:
    assert isinstance(block, Block)
    if block.place.resampling == "down":
        x = F.avg_pool2d(x, 2)
    elif block.place.resampling == "up":
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    if appended is not None:
        size = math.sqrt((x.shape[1] + appended.shape[1]) / 2)
        x = torch.cat([x * (size / math.sqrt(x.shape[1])), appended * (size / math.sqrt(appended.shape[1]))], dim=1)
    if not block.decodes:
        x = normalize(x if block.skip is None else product(block.skip, x), (1,))
    y = _modulated(block.modulation, product(block.first, silu(x)), condition)
    if block.decodes and block.skip is not None:
        x = product(block.skip, x)
    x = add(x, product(block.second, silu(y)))
    return (x if block.attention is None else _attended(block.attention, x)).clip(-256, 256)


def _modulated(layer: torch.nn.Module, y: Tensor, condition: Tensor) -> Tensor:
    if isinstance(layer, Modulation):
        return y * (product(layer.gain, condition) + 1)[:, :, None, None]
    assert isinstance(layer, DoubleNorm)
    halves = zip((layer.scale, layer.shift), condition.chunk(2, dim=1), strict=True)
    scale, shift = (normalize(product(each, half), (1,))[:, :, None, None] for each, half in halves)
    return normalize(y, (1,)) * scale + shift


def _attended(layer: Attention, x: Tensor) -> Tensor:
    B, C, H, W = x.shape
    qkv = normalize(product(layer.qkv, x).reshape(B, 3, layer.heads, C // layer.heads, H * W), (3,))
    q, k, v = qkv.transpose(-1, -2).unbind(1)
    mixed = F.scaled_dot_product_attention(q, k, v)
    return add(x, product(layer.project, mixed.transpose(-1, -2).reshape(B, C, H, W)))
