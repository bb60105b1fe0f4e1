"""Shapes of the U-Nets before EDM2: DDPM++ and NCSN++ (Song et al. 2021), ADM (Dhariwal & Nichol 2021).

All as EDM writes them (Karras et al. 2022, appendix C), whose published weights fit; `-scm` is the form of sCM
(Lu & Song 2024, section 4.1): adaptive double normalisation, and a slow embedding of c_noise = t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Modulation = Literal["shift", "scale_shift", "double_norm"]
Embedding = Literal["positional", "fourier"]


@dataclass(frozen=True)
class Form:
    """In what the families differ, beside their shape."""

    modulation: Modulation  # how the condition enters a block
    embedding: Embedding = "positional"
    ends_at_period: bool = False  # the positional frequencies reach 1 / period itself
    sines_first: bool = False
    embedding_factor: int = 1  # the embedding of the noise has that many times `channels` numbers
    labels_early: bool = False  # the class joins the embedding of the noise, not what two layers make of it
    filter: tuple[int, ...] = (1, 1)  # of resampling, along rows and columns
    image_pyramid: bool = False  # coarser levels of the encoder are given the image too (NCSN++'s residual encoder)
    sparse_attention: bool = False  # in the decoder after the last block of a level alone
    resampled_skip: bool = False  # a 1x1 convolution on the way around a block that resamples
    eps: float = 1e-5  # of group normalisation
    sum_factor: float = 1.0  # of every sum of a branch and what it came from
    glorot: bool = False  # weights are drawn by fans in and out; PyTorch's: by fan in
    last_gain: float = 0.0  # of the initial weights of what ends a branch


_DDPMPP = Form(
    "shift",
    ends_at_period=True,
    sines_first=True,
    labels_early=True,
    sparse_attention=True,
    resampled_skip=True,
    eps=1e-6,
    sum_factor=math.sqrt(0.5),
    glorot=True,
    last_gain=1e-5,
)
_NCSNPP = replace(_DDPMPP, filter=(1, 3, 3, 1), image_pyramid=True)

SongName = Literal["ddpmpp", "ncsnpp", "ddpmpp-scm", "ncsnpp-scm"]
FORMS: dict[str, Form] = {
    "ddpmpp": _DDPMPP,
    "ddpmpp-scm": replace(_DDPMPP, modulation="double_norm"),
    "ncsnpp": replace(_NCSNPP, embedding="fourier", embedding_factor=2),
    "ncsnpp-scm": replace(_NCSNPP, modulation="double_norm"),
}


@dataclass(frozen=True)
class UNetOptions:
    """A DDPM++ or NCSN++ of any width and depth; the defaults are those of the published ones for 32x32 pixels."""

    name: SongName
    channels: int = 128  # of the embedded image
    multipliers: tuple[int, ...] = (2, 2, 2)  # of `channels`, per level; each level halves the resolution
    blocks: int = 4  # per level of the encoder; the decoder has one more
    attention: tuple[int, ...] = (16,)  # resolutions with self-attention, beside the coarsest
    dropout: float = 0.0
    # Positional: the highest frequency, rad per unit of c_noise, 1 unless given. Fourier (ncsnpp): the standard
    # deviation of the frequencies in turns per unit, 16 unless given ("Fourier scale").
    time_scale: float | None = None

    def __post_init__(self) -> None:
        check_shape(self)

    @property
    def form(self) -> Form:
        return FORMS[self.name]

    @property
    def head_channels(self) -> int | None:
        """None: all channels are one head."""
        return None


@dataclass(frozen=True)
class ADMOptions:
    """An ADM of any width and depth; the defaults are those of the published one for 64x64 pixels."""

    name: Literal["adm"] = "adm"
    channels: int = 192  # of the embedded image
    multipliers: tuple[int, ...] = (1, 2, 3, 4)  # of `channels`, per level; each level halves the resolution
    blocks: int = 3  # per level of the encoder; the decoder has one more
    attention: tuple[int, ...] = (32, 16, 8)  # resolutions with self-attention, beside the coarsest
    head_channels: int = 64
    modulation: Modulation = "scale_shift"  # double_norm: in the manner of sCM
    dropout: float = 0.0
    time_scale: float | None = None  # highest frequency of the embedding, rad per unit of c_noise; 1 unless given

    def __post_init__(self) -> None:
        check_shape(self)

    @property
    def form(self) -> Form:
        return Form(self.modulation)


@dataclass(frozen=True)
class ADMSize:
    """EDM's and OpenAI's for ImageNet 64x64 (one shape), OpenAI's of 2023 for LSUN 256x256.

    What OpenAI's are told is 1000 times EDM's c_noise, so their `time_scale` is 1000.
    """

    name: Literal["adm-imagenet64", "adm-lsun256"]
    dropout: float = 0.0
    time_scale: float | None = None  # highest frequency of the embedding, rad per unit of c_noise; 1 unless given

    def __post_init__(self) -> None:
        _check_rates(self)

    @property
    def free(self) -> ADMOptions:
        """The same network by width and depth."""
        shape = ADMOptions(dropout=self.dropout, time_scale=self.time_scale)
        if self.name == "adm-imagenet64":
            return shape
        return replace(shape, channels=256, multipliers=(1, 1, 2, 2, 4, 4), blocks=2, modulation="shift")


def check_shape(options: UNetOptions | ADMOptions) -> None:
    """ValueError for what fits no image."""
    for key in ("blocks", "head_channels"):
        value = getattr(options, key)
        if value is not None and value < 1:
            raise ValueError(f"network.{key} must be at least 1")
    if options.channels < 4 or options.channels % 4:
        raise ValueError("network.channels must be a multiple of 4: groups of normalisation have at least four")
    if not options.multipliers or min(options.multipliers) < 1:
        raise ValueError("network.multipliers must be whole numbers of at least 1, one per level")
    _check_rates(options)


def _check_rates(options: UNetOptions | ADMOptions | ADMSize) -> None:
    if not 0 <= options.dropout < 1:
        raise ValueError("network.dropout must be in [0, 1)")
    if options.time_scale is not None and not options.time_scale > 0:
        raise ValueError("network.time_scale must be positive")
