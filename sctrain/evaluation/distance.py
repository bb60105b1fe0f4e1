"""The Frechet distance alone, for benches and searches that leave nothing in the run's folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sctrain.evaluation.extractor import Extractor, load_extractor
from sctrain.evaluation.frechet import Moments, frechet_distance
from sctrain.evaluation.images import blocks, open_pictures


@dataclass(frozen=True)
class Distance:
    """To the training split, through the extractor of the data."""

    extractor: Extractor
    training: Moments

    @staticmethod
    def of(url: str, device: torch.device, vae: Path | None = None) -> "Distance":
        """Of the data at `url`; UserError if they have no extractor. `vae` is the decoder of latents."""
        extractor = load_extractor(url, device)
        train = open_pictures(url, "train", vae)
        return Distance(extractor, Moments.over(extractor.features(block) for block in blocks(train)))

    def __call__(self, pixels: Tensor) -> float:
        """Of uint8 (N, C, H, W), N >= 2."""
        return frechet_distance(Moments.of(self.extractor.features(pixels)), self.training)
