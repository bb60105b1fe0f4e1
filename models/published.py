"""The published networks by name: what they are evaluated on, how large they are, and what one evaluation costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.dit_options import SHAPES, DiTSize
from models.edm2_options import CHANNELS, EDM2Size
from models.layers import Conditioning
from models.registry import NetworkOptions, build_network
from models.unet_options import ADMSize, SongName, UNetOptions


@dataclass(frozen=True)
class Published:
    """A network as its paper evaluates it. `classes` is 1 where it is told none."""

    options: NetworkOptions
    channels: int
    side: int  # pixels, of images or of latents
    classes: int = 1
    latent: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.side, self.side


@dataclass(frozen=True)
class Size:
    """Parameters with all that a run trains; multiply-adds of matrix products and convolutions, for one image."""

    parameters: int
    multiply_adds: int


def _published() -> dict[str, Published]:
    dits = [
        Published(DiTSize(f"{family}-{size}"), 4, 32, 1000, latent=True)  # pyright: ignore[reportArgumentType]
        for family in ("dit", "dit-zero")
        for size in SHAPES
    ]
    edm2s = [
        Published(EDM2Size(f"{family}-{size}"), 4, 64, 1000, latent=True)  # pyright: ignore[reportArgumentType]
        for family in ("edm2", "edm2-scm")
        for size in CHANNELS
    ]
    songs = [Published(UNetOptions(name), 3, 32) for name in get_args(SongName)]
    adms = [Published(ADMSize("adm-imagenet64"), 3, 64, 1000), Published(ADMSize("adm-lsun256"), 3, 256)]
    return {network.options.name: network for network in (*songs, *adms, *dits, *edm2s)}


PUBLISHED = _published()


def size(network: Published) -> Size:
    """Of the network and of one forward pass, on torch's meta device: no weight is made."""
    with torch.device("meta"), torch.no_grad():
        module = build_network(network.options, *network.shape, Conditioning(network.classes))
        with FlopCounterMode(display=False) as counter:
            module(torch.empty(1, *network.shape), torch.empty(1), torch.zeros(1, dtype=torch.long))
    return Size(sum(parameter.numel() for parameter in module.parameters()), counter.get_total_flops() // 2)
