"""What is left of a picture for an edit to start from, in pixels: float32 (B, C, H, W) in [0, 255]."""

from __future__ import annotations

import torch
from torch import Tensor

from sctrain.editing.operators import LUMINANCE

UNSEEN = 128.0  # shown where a picture is to be generated


def without(pixels: Tensor, missing: Tensor) -> Tensor:
    """The picture for people: mid-gray where `missing` (H, W)."""
    return pixels.float().masked_fill(missing, UNSEEN)


def gray(pixels: Tensor) -> Tensor:
    """The luminance in three equal channels; of one channel, that channel.

    The paper's weights, which sum to 0.9999, are divided by their sum: then a gray picture is its own luminance.
    """
    if pixels.shape[1] == 1:
        return pixels.float().expand(-1, 3, -1, -1)
    weights = torch.tensor(LUMINANCE, device=pixels.device)
    luminance = torch.einsum("bchw,c->bhw", pixels.float(), weights / weights.sum())
    return luminance[:, None].expand(-1, 3, -1, -1)


def coarse(pixels: Tensor, factor: int) -> Tensor:
    """The mean of every factor x factor patch, in all its pixels."""
    return enlarged(torch.nn.functional.avg_pool2d(pixels.float(), factor), factor)


def enlarged(pixels: Tensor, factor: int) -> Tensor:
    """Every pixel as factor x factor pixels."""
    return pixels.float().repeat_interleave(factor, -1).repeat_interleave(factor, -2)
