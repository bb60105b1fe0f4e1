"""Weights of diffusers' UNet2DModel, where it is an ADM, by the names that our U-Net gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from models.unet import UNet
from models.unet_layers import Block

_IN_DIFFUSERS = {
    "norm": "norm1",
    "first": "conv1",
    "modulation.affine": "time_emb_proj",
    "modulation.norm": "norm2",
    "second": "conv2",
    "skip": "conv_shortcut",
}
_LAYERS = {
    "condition.hidden": "time_embedding.linear_1",
    "condition.out": "time_embedding.linear_2",
    "embed": "conv_in",
    "norm": "conv_norm_out",
    "head": "conv_out",
}


def from_diffusers(published: Mapping[str, Tensor], network: UNet) -> dict[str, Tensor]:
    """All of ours but what only we have, of its signs as published; KeyError names one that is not there."""
    weights: dict[str, Tensor] = {}
    for suffix in ("weight", "bias"):
        for ours, theirs in _LAYERS.items():
            weights[f"{ours}.{suffix}"] = published[f"{theirs}.{suffix}"]
        for ours, block, resnet, attention in _blocks(network):
            for part, name in _IN_DIFFUSERS.items():
                if getattr(block, part.split(".")[0]) is not None:
                    weights[f"{ours}.{part}.{suffix}"] = published[f"{resnet}.{name}.{suffix}"]
            if block.attention is not None:
                weights |= _attention(published, f"{ours}.attention", attention, suffix)
    count, width = network.condition.label.weight.shape
    table = published.get("class_embedding.weight")
    none = torch.zeros(1, width)
    rows = none.expand(count, -1) if table is None else torch.cat([table.float(), none])
    return weights | {"condition.label.weight": rows.clone()}


def _attention(published: Mapping[str, Tensor], ours: str, theirs: str, suffix: str) -> dict[str, Tensor]:
    kinds = [published[f"{theirs}.{kind}.{suffix}"] for kind in ("to_q", "to_k", "to_v")]
    found = {"norm": published[f"{theirs}.group_norm.{suffix}"], "qkv": torch.cat(kinds)}
    found["project"] = published[f"{theirs}.to_out.0.{suffix}"]
    if suffix == "weight":  # of linear layers there, of convolutions here
        found |= {name: found[name][..., None, None] for name in ("qkv", "project")}
    return {f"{ours}.{name}.{suffix}": tensor for name, tensor in found.items()}


def _blocks(network: UNet) -> Iterator[tuple[str, Block, str, str]]:
    """(our block's name, itself, their residual block, their attention).

    A block that resamples begins a level of ours, and ends the level before of theirs.
    """
    for room, way, resampler in (("encoder", "down_blocks", "downsamplers"), ("decoder", "up_blocks", "upsamplers")):
        level = number = 0
        for place, block in enumerate(getattr(network, room)):
            ours = f"{room}.{place}"
            if block.place.resampling != "keep":
                yield ours, block, f"{way}.{level}.{resampler}.0", ""
                level, number = level + 1, 0
            elif room == "decoder" and not block.place.appended:
                yield ours, block, f"mid_block.resnets.{place}", "mid_block.attentions.0"
            else:
                yield ours, block, f"{way}.{level}.resnets.{number}", f"{way}.{level}.attentions.{number}"
                number += 1
