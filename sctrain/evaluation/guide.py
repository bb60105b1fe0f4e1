"""A second diffusion model that the first is guided by: a smaller one without labels, or a weaker one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from sctrain.building import parameterization
from sctrain.config.schema import RunConfig
from sctrain.errors import UserError
from sctrain.evaluation.source import Source
from sctrain.parameterization import Network
from sctrain.sources import answers_without_label

GuideLabels = Literal["none", "same"]


@dataclass(frozen=True)
class Guide:
    """The network on its device, and what it is told in place of the label; None: the label itself."""

    module: nn.Module
    network: Network
    no_label: int | None

    @staticmethod
    def of(guided: Source, source: Source, labels: GuideLabels | None, device: torch.device) -> Guide:
        """Of two diffusion models on the same data; UserError, which names the flag, for others.

        `labels` None: none where the guide was trained with label dropout, else the same.
        """
        for each in (guided, source):
            if each.config.objective.samples_as != "diffusion":
                trained = f"{each.place} was trained by '{each.config.objective.name}'"
                raise UserError(f"{trained}, and --guide is for diffusion models; remove it")
        _refuse_other_data(guided, source)
        drops = answers_without_label(source.config)
        if labels == "none" and not drops:
            raise UserError(
                f"{source.place} was trained without label dropout, so it knows no images without a label: "
                "use --guide-labels same"
            )
        module = source.network().to(device).eval()
        without = labels == "none" or (labels is None and drops)
        F = parameterization(source.config).of(module)
        return Guide(module, F, len(source.about.classes) if without else None)

    @staticmethod
    def scale(config: RunConfig, asked: float | None) -> float:
        """The scale asked for, else the one that the guided run is evaluated with; UserError if there is neither."""
        scale = config.evaluation.guidance if asked is None else asked
        if scale is None or not 0 <= scale < math.inf:
            raise UserError("--guide needs a scale: give for example --guidance 1.4, where 1 is no guidance")
        return scale


def _refuse_other_data(guided: Source, guide: Source) -> None:
    about = [
        (s.config.sigma_data, s.about.shape, len(s.about.classes), set(s.config.data.mean), set(s.config.data.std))
        for s in (guided, guide)
    ]
    for name, ours, theirs in zip(
        ("sigma_data", "image shape", "classes", "data.mean", "data.std"), *about, strict=True
    ):
        if ours != theirs:
            raise UserError(
                f"--guide {guide.place} has {name} {theirs}, {guided.place} has {ours}: the same x is another image; "
                "name a guide that was trained on the same data in the same way"
            )
