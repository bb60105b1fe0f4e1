"""Published weights by the names that our U-Nets give them: EDM's (Karras et al. 2022) and OpenAI's of 2023.

Both publish what their networks add to c_skip x as c_out F: TrigFlow's F is the negative. Nothing is turned here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from models.layers import AUGMENTATION_LABELS
from models.unet import UNet
from models.unet_layers import Attention, Block

_IN_EDM = {
    "norm": "norm0",
    "first": "conv0",
    "modulation.affine": "affine",
    "modulation.norm": "norm1",
    "second": "conv1",
    "skip": "skip",
    "attention.norm": "norm2",
    "attention.qkv": "qkv",
    "attention.project": "proj",
}
_IN_OPENAI = {  # {block}.{part}; attention is a part of its own, beside the block
    "norm": "in_layers.0",
    "first": "in_layers.2",
    "modulation.affine": "emb_layers.1",
    "modulation.norm": "out_layers.0",
    "second": "out_layers.3",
    "skip": "skip_connection",
}
_ATTENTION_IN_OPENAI = {"attention.norm": "norm", "attention.qkv": "qkv", "attention.project": "proj_out"}


def from_edm(published: Mapping[str, Tensor], network: UNet, side: int) -> dict[str, Tensor]:
    """Weights of EDM's SongUNet or DhariwalUNet for images of `side` pixels; KeyError names one that is not there.

    All of ours but what only we have: the weighting of losses, guidance, ends of jumps.
    """
    condition = network.condition
    weights = dict(_layers(published, _edm_names(network, side)))
    for name in [name for name in weights if ".attention.qkv." in name]:
        weights[name] = _split_by_kind(weights[name], _heads(network, name))
    if condition.form.embedding == "fourier":
        weights["condition.time.turns"] = published["map_noise.freqs"]
    if condition.augmentation is not None:
        none = torch.zeros(2 * condition.time.pairs, AUGMENTATION_LABELS)
        weights["condition.augmentation.weight"] = published.get("map_augment.weight", none)
    by_class = published.get("map_label.weight")
    none = torch.zeros(condition.label.embedding_dim)
    if by_class is not None and condition.form.labels_early:
        by_class, none = by_class * math.sqrt(by_class.shape[1]), published["map_label.bias"]
    rows = [] if by_class is None else list(by_class.T + none)
    return weights | {"condition.label.weight": _table(rows, none, network)}


def from_openai(published: Mapping[str, Tensor], network: UNet) -> dict[str, Tensor]:
    """Weights of the U-Nets of OpenAI's consistency models; as `from_edm`. Their `time_scale` is 1000."""
    weights = dict(_layers(published, _openai_names(network)))
    for name in [name for name in weights if ".attention." in name and weights[name].ndim == 3]:
        weights[name] = weights[name][..., None]  # of one-dimensional convolutions
    none = torch.zeros(network.condition.label.embedding_dim)
    rows = list(published["label_emb.weight"]) if "label_emb.weight" in published else []
    return weights | {"condition.label.weight": _table(rows, none, network)}


def _layers(published: Mapping[str, Tensor], names: Iterator[tuple[str, str]]) -> Iterator[tuple[str, Tensor]]:
    for ours, theirs in names:
        for suffix in ("weight", "bias"):
            yield f"{ours}.{suffix}", published[f"{theirs}.{suffix}"]


def _edm_names(network: UNet, side: int) -> Iterator[tuple[str, str]]:
    """(our layer, theirs)."""
    song = network.condition.form.labels_early
    yield from {"condition.hidden": "map_layer0", "condition.out": "map_layer1"}.items()
    yield "embed", f"enc.{side}x{side}_conv"
    pyramids = 0
    for ours, block, theirs in _edm_blocks(network):
        yield from _parts(ours, block, theirs, _IN_EDM)
        if network.pyramid and block.place.resampling == "down":
            yield f"pyramid.{pyramids}.convolution", theirs.replace("down", "aux_residual")
            pyramids += 1
    yield "norm", f"dec.{side}x{side}_aux_norm" if song else "out_norm"
    yield "head", f"dec.{side}x{side}_aux_conv" if song else "out_conv"


def _edm_blocks(network: UNet) -> Iterator[tuple[str, Block, str]]:
    for room, prefix in (("encoder", "enc"), ("decoder", "dec")):
        seen: dict[int, int] = {}  # blocks by resolution
        for number, block in enumerate(network.blocks(room)):
            resolution, resampling = block.place.resolution, block.place.resampling
            where = f"{prefix}.{resolution}x{resolution}_"
            if resampling != "keep":
                word = resampling
            elif room == "decoder" and not block.place.appended:
                word = f"in{number}"
            else:
                word = f"block{seen.get(resolution, 0)}"
                seen[resolution] = seen.get(resolution, 0) + 1
            yield f"{room}.{number}", block, where + word


def _openai_names(network: UNet) -> Iterator[tuple[str, str]]:
    """(our layer, theirs)."""
    yield from {"condition.hidden": "time_embed.0", "condition.out": "time_embed.2"}.items()
    yield from {"embed": "input_blocks.0.0", "norm": "out.0", "head": "out.2"}.items()
    for number, block in enumerate(network.blocks("encoder")):
        yield from _openai_parts(f"encoder.{number}", block, f"input_blocks.{number + 1}", 0)
    outputs = -1
    decoder = network.blocks("decoder")
    for number, block in enumerate(decoder):
        ours = f"decoder.{number}"
        if block.place.appended:
            outputs += 1
            yield from _openai_parts(ours, block, f"output_blocks.{outputs}", 0)
        elif block.place.resampling == "up":  # stands behind the last block of the level above, and its attention
            behind = 2 if decoder[number - 1].attention is not None else 1
            yield from _openai_parts(ours, block, f"output_blocks.{outputs}", behind)
        else:
            yield from _openai_parts(ours, block, "middle_block", 2 * number)


def _openai_parts(ours: str, block: Block, theirs: str, place: int) -> Iterator[tuple[str, str]]:
    yield from _parts(ours, block, f"{theirs}.{place}", _IN_OPENAI)
    yield from _parts(ours, block, f"{theirs}.{place + 1}", _ATTENTION_IN_OPENAI)


def _parts(ours: str, block: Block, theirs: str, names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for part, name in names.items():
        if getattr(block, part.split(".")[0]) is not None:
            yield f"{ours}.{part}", f"{theirs}.{name}"


def _heads(network: UNet, name: str) -> int:
    attention = network.get_submodule(name.partition(".qkv")[0])
    assert isinstance(attention, Attention)
    return attention.heads


def _split_by_kind(weight: Tensor, heads: int) -> Tensor:
    """EDM has query, key and value of one channel of one head side by side; we have all queries first."""
    apart = weight.reshape(heads, weight.shape[0] // heads // 3, 3, *weight.shape[1:])
    return apart.movedim(2, 0).reshape(weight.shape)


def _table(rows: list[Tensor], none: Tensor, network: UNet) -> Tensor:
    """Rows by class and the one of "no class"; networks without classes are told nothing whatever the class."""
    count = network.condition.label.num_embeddings
    return torch.stack([*rows, none] if rows else [none] * count)
