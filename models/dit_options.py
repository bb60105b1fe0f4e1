"""Shapes of the transformers: DiT (Peebles & Xie 2023) in the form that sCM needs, and as it was published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal["dit", "dit-zero"]


@dataclass(frozen=True)
class DiTOptions:
    """Shape of a DiT. Tokens are patch_size x patch_size pixels; width must be a multiple of heads.

    `dit-zero` is the published form, adaLN-Zero, whose weights can be imported.
    """

    name: Family = "dit"
    width: int = 384
    depth: int = 12
    heads: int = 6
    patch_size: int = 2
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    time_scale: float = 1.0  # highest frequency of the embedding of time, rad per unit (iCT's "embedding scale")
    time_period: float | None = None  # highest frequency over the lowest; None: the form's own
    mlp_eps: float | None = None  # dit-zero: of the normalisation before the MLP, 1e-6; diffusers has 1e-5

    def __post_init__(self) -> None:
        for key in ("width", "depth", "heads", "patch_size", "mlp_ratio"):
            if getattr(self, key) < 1:
                raise ValueError(f"network.{key} must be at least 1")
        for key in ("time_scale", "time_period", "mlp_eps"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ValueError(f"network.{key} must be positive")
        if not 0 <= self.dropout < 1:
            raise ValueError("network.dropout must be in [0, 1)")
        if self.mlp_eps is not None and not self.is_zero:
            raise ValueError("network.mlp_eps is for dit-zero; remove it")

    @property
    def is_zero(self) -> bool:
        """Whether blocks are gated, and silent at first."""
        return self.name == "dit-zero"


SHAPES = {  # DiT table 1: width, depth, heads
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "xl": (1152, 28, 16),
}
_OfSCM = Literal["dit-s", "dit-b", "dit-l", "dit-xl"]
_AsPublished = Literal["dit-zero-s", "dit-zero-b", "dit-zero-l", "dit-zero-xl"]


@dataclass(frozen=True)
class DiTSize:
    """A published width, depth and number of heads, on patches of 2x2; the blocks are those of the family."""

    name: _OfSCM | _AsPublished
    dropout: float = 0.0
    time_scale: float = 1.0  # highest frequency of the embedding of time, rad per unit

    def __post_init__(self) -> None:
        assert self.free

    @property
    def free(self) -> DiTOptions:
        """The same network by width and depth."""
        family, _, size = self.name.rpartition("-")
        width, depth, heads = SHAPES[size]
        name: Family = "dit" if family == "dit" else "dit-zero"
        return DiTOptions(name, width, depth, heads, dropout=self.dropout, time_scale=self.time_scale)
