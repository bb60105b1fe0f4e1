"""What can be drawn from: a snapshot of a run, or an exported model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.description import DatasetDescription, read_description
from sctrain import building
from sctrain.config.schema import RunConfig, WeightsFrom
from sctrain.errors import UserError
from sctrain.evaluation.method import ema_width
from sctrain.exports import Export, is_export, read_export
from sctrain.snapshots import newest_images, snapshot_config


@dataclass(frozen=True)
class Source:
    """Weights, and the descriptions of the network and of the data that they were trained on."""

    place: Path
    images: int
    ema: float
    config: RunConfig
    about: DatasetDescription
    export: Export | None = None

    @staticmethod
    def of(place: Path, ema: float | None = None, images: int | None = None) -> Source:
        """The newest snapshot of a run, or the one at `images`; or an exported model. UserError if there is none.

        `ema` None is the width that the run is scored with first, or the only one that was exported.
        """
        if is_export(place):
            return _exported(place, ema)
        images = newest_images(place) if images is None else images
        config = snapshot_config(place, images)
        building.use_storage(config)
        return Source(place, images, ema_width(config, ema), config, read_description(config.data.url))

    def network(self) -> torch.nn.Module:
        """With these weights, on the CPU."""
        if self.export is None:
            weights = WeightsFrom(run=self.place, images=self.images, ema=self.ema)
            return building.trained_network(self.config, self.about, weights)
        return building.network_with(self.config, self.about, self.export.weights(), self.place)


def _exported(place: Path, ema: float | None) -> Source:
    found = read_export(place)
    if ema not in (None, found.ema):
        raise UserError(f"{place} holds the EMA of width {found.ema:g} alone; remove --ema, or export the run again")
    return Source(place, found.images, found.ema, found.config, found.about, found)
