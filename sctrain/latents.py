"""The model space of latents: pictures come out of the auto-encoder's decoder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from data_pipeline.latents import ConventionName
from sctrain.errors import UserError
from sctrain.processes import ModelSpace
from sctrain.vae import Vae, load_vae


@dataclass(frozen=True)
class LatentSpace(ModelSpace):
    """x = (latent - mean) sigma_data / std; the decoder is loaded when the first picture is wanted."""

    vae: Path | None = None  # folder of the auto-encoder
    convention: ConventionName | None = None  # None: of none that is published

    def to_pixels(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> uint8 (B, 3, H, W). UserError where there is no decoder."""
        mean, std = self._channels(x)
        return self.decoded(x.float() * (std / self.sigma_data) + mean)

    def decoded(self, latents: Tensor) -> Tensor:
        """Latents as they are stored (B, C, h, w) -> uint8 (B, 3, H, W)."""
        return self.decoder().decode(latents.float())

    def decoder(self) -> Vae:
        """The auto-encoder, loaded once, on the GPU where there is one. UserError where there is none."""
        if self.convention is None:
            raise UserError("these latents are of no published convention, so nothing can decode them into pictures")
        if self.vae is None:
            raise UserError("pictures of latents need a decoder: give --vae, or set 'data.vae', its folder")
        return _loaded(self.vae, self.convention)

    def to_signed(self, x: Tensor) -> Tensor:
        raise UserError("latents have no pixel values before they are decoded: choose the metric l2 or pseudo_huber")


def known_convention(name: str) -> ConventionName | None:
    """The published convention of this name; None where there is none."""
    return next((known for known in get_args(ConventionName) if known == name), None)


@cache
def _loaded(folder: Path, convention: ConventionName) -> Vae:
    return load_vae(folder, convention, "cuda" if torch.cuda.is_available() else "cpu")
