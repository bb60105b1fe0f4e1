"""Exported models: one EMA with all that is needed to draw from it, and nothing of the run folder or the data.

model.safetensors          the weights by parameter name, float32; in the diffusers format a component of a pipeline
README.md                  the model card
manifest.json              run description, description of the data, checksums; see sealed_folder.py
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from data_pipeline.description import DatasetDescription
from sctrain.config.schema import RunConfig
from sctrain.errors import UserError
from sctrain.sealed_folder import MANIFEST, read_manifest, verified
from sctrain.snapshots import StoredWeights

KIND = "exported model"
Format = Literal["safetensors", "diffusers"]
_MEND = "export the model again"


@dataclass(frozen=True)
class Export:
    """What the manifest of an exported model says."""

    folder: Path
    images: int  # that the model has seen
    ema: float  # its relative width
    config: RunConfig
    about: DatasetDescription
    manifest: dict[str, Any]

    def weights(self) -> StoredWeights:
        """By parameter name; UserError if the file is missing or damaged."""
        file = verified(self.folder, self.manifest["weights"], self.manifest, _MEND)
        return StoredWeights(self.manifest["tensors"], [(1.0, file)], self.manifest["prefix"])


def is_export(folder: Path) -> bool:
    """Whether there is an exported model in `folder`, rather than a run."""
    return (folder / MANIFEST).is_file()


def read_export(folder: Path) -> Export:
    """The model in `folder`; UserError if it is none, damaged, or of another version."""
    manifest = read_manifest(folder, _MEND)
    if manifest.get("kind") != KIND:
        raise UserError(f"{folder} is no exported model; name a run folder, or what `sctrain export` wrote")
    try:
        config = RunConfig.model_validate(manifest["config"])
        about = DatasetDescription.model_validate_json(json.dumps(manifest["data"]))
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"{folder} was exported by another version of sctrain, whose description differs at '{key}': "
            "use that version, or export the model again"
        ) from error
    return Export(folder, manifest["images"], manifest["ema"], config, about, manifest)
