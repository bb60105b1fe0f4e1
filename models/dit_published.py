"""Published weights by the names that our `dit-zero` gives them: DiT's own (Peebles & Xie 2023), and diffusers'."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from models.dit import DiT


def from_dit(published: Mapping[str, Tensor], network: DiT) -> dict[str, Tensor]:
    """All of ours but what only we have; KeyError names one that is not there."""
    layers = {
        "embed": "x_embedder.proj",
        "condition.hidden": "t_embedder.mlp.0",
        "condition.out": "t_embedder.mlp.2",
        "norm.modulation": "final_layer.adaLN_modulation.1",
        "head": "final_layer.linear",
    }
    parts = {"qkv": "attn.qkv", "project": "attn.proj", "up": "mlp.fc1", "down": "mlp.fc2"}
    for number in range(len(network.blocks)):
        layers |= {f"blocks.{number}.{ours}": f"blocks.{number}.{theirs}" for ours, theirs in parts.items()}
        layers[f"blocks.{number}.modulation"] = f"blocks.{number}.adaLN_modulation.1"
    weights = _named(published, layers)
    return _in_our_shapes(weights, published["y_embedder.embedding_table.weight"], network)


def from_diffusers_dit(published: Mapping[str, Tensor], network: DiT) -> dict[str, Tensor]:
    """The same of diffusers' DiTTransformer2DModel, of which every block has an embedding of the condition: the first.

    Of its own: query, key and value are three layers.
    """
    embedding = "transformer_blocks.0.norm1.emb"
    layers = {
        "embed": "pos_embed.proj",
        "condition.hidden": f"{embedding}.timestep_embedder.linear_1",
        "condition.out": f"{embedding}.timestep_embedder.linear_2",
        "norm.modulation": "proj_out_1",
        "head": "proj_out_2",
    }
    parts = {"project": "attn1.to_out.0", "up": "ff.net.0.proj", "down": "ff.net.2", "modulation": "norm1.linear"}
    kinds = ("to_q", "to_k", "to_v")
    for number in range(len(network.blocks)):
        theirs = f"transformer_blocks.{number}"
        layers |= {f"blocks.{number}.{own}": f"{theirs}.{name}" for own, name in parts.items()}
    weights = _named(published, layers)
    for number in range(len(network.blocks)):
        for suffix in ("weight", "bias"):
            split = [published[f"transformer_blocks.{number}.attn1.{kind}.{suffix}"] for kind in kinds]
            weights[f"blocks.{number}.qkv.{suffix}"] = torch.cat(split)
    return _in_our_shapes(weights, published[f"{embedding}.class_embedder.embedding_table.weight"], network)


def _named(published: Mapping[str, Tensor], layers: Mapping[str, str]) -> dict[str, Tensor]:
    suffixes = ("weight", "bias")
    return {f"{own}.{end}": published[f"{theirs}.{end}"] for own, theirs in layers.items() for end in suffixes}


def _in_our_shapes(weights: dict[str, Tensor], classes: Tensor, network: DiT) -> dict[str, Tensor]:
    """Convolutions of patches become linear layers, modulation a layer per use; the learned variance is left out."""
    channels = network.head.out_features // network.patch**2
    weights["embed.weight"] = weights["embed.weight"].flatten(1)  # (W, C, p, p), the order of our tokens
    # Their sines and cosines are not of unit size.
    weights["condition.hidden.weight"] = weights["condition.hidden.weight"] / math.sqrt(2)
    weights["condition.label.weight"] = classes
    for end in ("weight", "bias"):
        for number in range(len(network.blocks)):
            block = f"blocks.{number}"
            of_attention, of_mlp = weights.pop(f"{block}.modulation.{end}").chunk(2)
            for part, rows in (("attention", of_attention), ("mlp", of_mlp)):
                shift, scale, gate = rows.chunk(3)
                weights[f"{block}.{part}_norm.modulation.{end}"] = torch.cat([shift, scale])
                weights[f"{block}.{part}_gate.alpha.{end}"] = gate
        name = f"head.{end}"  # theirs are by place in the patch, then by channel: values, then variances
        by_place = weights[name].unflatten(0, (network.patch**2, -1))
        weights[name] = by_place[:, :channels].transpose(0, 1).flatten(0, 1)
    return weights
