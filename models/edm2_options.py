"""Shapes of the EDM2 U-Net (Karras et al. 2024): the free form, and the published sizes by name."""

from dataclasses import dataclass
from typing import Literal, get_args

Family = Literal["edm2", "edm2-scm"]
_Published = Literal["edm2-xs", "edm2-s", "edm2-m", "edm2-l", "edm2-xl", "edm2-xxl"]
_OfSCM = Literal["edm2-scm-xs", "edm2-scm-s", "edm2-scm-m", "edm2-scm-l", "edm2-scm-xl", "edm2-scm-xxl"]
CHANNELS = {"xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}  # EDM2 table 6


@dataclass(frozen=True)
class EDM2Options:
    """An EDM2 U-Net of any width and depth; the defaults are those of all published sizes but for `channels`.

    `edm2` is told ln(sigma) / 4 and modulates as published; `edm2-scm` is told t and has adaptive double
    normalisation (sCM section 4.1).
    """

    name: Family = "edm2"
    channels: int = 192  # of the first level
    multipliers: tuple[int, ...] = (1, 2, 3, 4)  # of `channels`, per level; each level halves the resolution
    blocks: int = 3  # per level of the encoder; the decoder has one more
    attention: tuple[int, ...] = (16, 8)  # resolutions with self-attention
    head_channels: int = 64
    dropout: float = 0.0
    dropout_below: int | None = None  # dropout at resolutions up to this one alone; None: at all
    told_classes: bool = True  # false: EDM2's networks without classes, which guide others
    whole_condition: bool = False  # edm2-scm: scale and shift see all of the condition, with twice the weights
    time_period: float = 100.0  # edm2-scm: of the slowest frequency of the embedding of time to the fastest

    def __post_init__(self) -> None:
        for key in ("channels", "blocks", "head_channels"):
            if getattr(self, key) < 1:
                raise ValueError(f"network.{key} must be at least 1")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError("network.multipliers must be whole numbers of at least 1, one per level")
        if self.channels % 2:
            raise ValueError("network.channels must be even: the time is told in sines and cosines")
        _check_dropout(self.dropout)


@dataclass(frozen=True)
class EDM2Size:
    """A published size; `edm2-scm-*` in the form of sCM."""

    name: _Published | _OfSCM
    dropout: float = 0.0
    dropout_below: int | None = None  # dropout at resolutions up to this one alone; None: at all

    def __post_init__(self) -> None:
        _check_dropout(self.dropout)

    @property
    def free(self) -> EDM2Options:
        """The same network by width and depth."""
        family: Family = "edm2-scm" if self.name in get_args(_OfSCM) else "edm2"
        channels = CHANNELS[self.name.rpartition("-")[2]]
        return EDM2Options(family, channels, dropout=self.dropout, dropout_below=self.dropout_below)


def _check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError("network.dropout must be in [0, 1)")
