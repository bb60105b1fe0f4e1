"""Published weights of EDM2's networks by the names that our U-Net gives them.

Karras et al. 2024 publish what a network adds to c_skip x as c_out F: TrigFlow's F is the negative. edm2_sCM (Mathew et
al. 2026) publishes TrigFlow's F, of networks in the form of sCM. Nothing is turned here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import Tensor

from models.edm2 import EDM2
from models.edm2_layers import Attention
from models.magnitude import MPFourier

_PARTS = {  # ours -> theirs; all that a block may have
    "first.weight": "conv_res0.weight",
    "modulation.gain.weight": "emb_linear.weight",
    "modulation.gain.gain": "emb_gain",
    "second.weight": "conv_res1.weight",
    "skip.weight": "conv_skip.weight",
    "attention.qkv.weight": "attn_qkv.weight",
    "attention.project.weight": "attn_proj.weight",
}


def from_edm2(published: Mapping[str, Tensor], network: EDM2, side: int) -> dict[str, Tensor]:
    """All weights of ours for images of `side` pixels; KeyError names one that is not there.

    Of the form of sCM all but the weighting of losses, which belongs to a training.
    """
    weights = {
        "condition.noise.weight": published["unet.emb_noise.weight"],
        "embed.weight": published[f"unet.enc.{side}x{side}_conv.weight"],
        "head.weight": published["unet.out_conv.weight"],
        "head.gain": published["unet.out_gain"].reshape(1),
    }
    if network.condition.label is not None:
        weights["condition.label.weight"] = published["unet.emb_label.weight"]
    if isinstance(network.condition.time, MPFourier):
        weights |= _fourier(published, "unet.emb_fourier", "condition.time")
        weights |= _fourier(published, "logvar_fourier", "weighting.time")
        weights["weighting.out.weight"] = -published["logvar_linear.weight"]  # w = -u
    own = network.state_dict().keys()
    for ours, theirs in _blocks(network, side):
        for part, name in _PARTS.items():
            if f"{ours}.{part}" in own:
                found = published[f"{theirs}.{name}"]
                weights[f"{ours}.{part}"] = found if found.ndim else found.reshape(1)  # gains
        if f"{ours}.modulation.scale.weight" in own:
            scale, shift = published[f"{theirs}.emb_linear.weight"].chunk(2)
            weights |= {f"{ours}.modulation.scale.weight": scale, f"{ours}.modulation.shift.weight": shift}
        if f"{ours}.attention.qkv.weight" in weights:
            attention = network.get_submodule(f"{ours}.attention")
            assert isinstance(attention, Attention)
            weights[f"{ours}.attention.qkv.weight"] = _by_kind(weights[f"{ours}.attention.qkv.weight"], attention.heads)
    return weights


def _fourier(published: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    """Their frequencies and phases are in radians, ours in turns."""
    names = {"frequencies": "freqs", "phases": "phases"}
    return {f"{ours}.{own}": published[f"{theirs}.{name}"].float() / (2 * math.pi) for own, name in names.items()}


def _blocks(network: EDM2, side: int) -> Iterator[tuple[str, str]]:
    """(our block, theirs)."""
    for room, prefix in (("encoder", "enc"), ("decoder", "dec")):
        resolution, number = side if room == "encoder" else _coarsest(network, side), 0
        for place, block in enumerate(getattr(network, room)):
            if block.place.resampling == "keep":
                inner = room == "decoder" and not block.place.appended
                word = f"in{place}" if inner else f"block{number}"
                number += not inner
            else:
                resolution = resolution // 2 if block.place.resampling == "down" else resolution * 2
                word, number = block.place.resampling, 0
            yield f"{room}.{place}", f"unet.{prefix}.{resolution}x{resolution}_{word}"


def _coarsest(network: EDM2, side: int) -> int:
    return side >> sum(block.place.resampling == "down" for block in network.encoder)


def _by_kind(weight: Tensor, heads: int) -> Tensor:
    """Theirs has query, key and value of one channel of one head side by side; ours all queries first."""
    apart = weight.reshape(heads, weight.shape[0] // heads // 3, 3, *weight.shape[1:])
    return apart.movedim(2, 0).reshape(weight.shape)
