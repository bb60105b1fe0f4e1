"""Writes an exported model: weights streamed out of the snapshots, complete or absent, never over something else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from data_pipeline.description import DatasetDescription, read_description
from sctrain.config.schema import RunConfig
from sctrain.errors import UserError
from sctrain.exporting import diffusers_folder
from sctrain.exporting.card import model_card
from sctrain.exports import KIND, Format
from sctrain.files import write_text
from sctrain.provenance import code_version
from sctrain.runs import RunFolder, image_count_name
from sctrain.sealed_folder import describe_file, flush, partial_folder, read_manifest, seal
from sctrain.snapshots import StoredWeights, open_weights, snapshot_config
from sctrain.tensor_file import write_tensors

WEIGHTS = "model.safetensors"


def export(run: Path, images: int, ema: float, kind: Format, to: Path) -> None:
    """The EMA of relative width `ema` of the snapshot at `images` of `run`, into the new folder `to`.

    UserError where `to` exists, where the run cannot be had in this format, or the disk refuses.
    """
    if to.exists():
        raise UserError(f"{to} exists, and nothing is overwritten: name another folder with --to")
    config = snapshot_config(run, images)
    about = read_description(config.data.url)
    if kind == "diffusers":
        diffusers_folder.refuse_unfit(run, config)
    weights = open_weights(RunFolder(run).snapshots, images, ema)
    partial = partial_folder(to)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        manifest = _manifest(run, images, ema, config, about) | _write(partial, kind, config, about, weights)
        manifest["tensors"] = {name: list(shape) for name, shape in weights.shapes.items()}
        write_text(partial / "README.md", model_card(run, manifest, config, about, kind))
        for path in sorted(path for path in partial.rglob("*") if path.is_file()):
            name = path.relative_to(partial).as_posix()
            if name not in manifest["files"]:
                flush(path)
                manifest["files"][name] = describe_file(path)
        seal(to, manifest)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        mend = "make room or allow writing there, then repeat the command"
        raise UserError(f"{to} could not be written ({error}): {mend}") from error


def _manifest(run: Path, images: int, ema: float, config: RunConfig, about: DatasetDescription) -> dict[str, Any]:
    snapshot = read_manifest(RunFolder(run).snapshots / image_count_name(images), "publish it again")
    return {
        "kind": KIND,
        "images": images,
        "ema": ema,
        "config": config.model_dump(mode="json"),
        "data": about.model_dump(mode="json"),
        "exported_by": code_version(),
        "trained_by": snapshot.get("code"),
        "licence": config.licence,
    }


def _write(
    folder: Path, kind: Format, config: RunConfig, about: DatasetDescription, weights: StoredWeights
) -> dict[str, Any]:
    """All but card and manifest; where the weights are, what their file is, and what their names begin with."""
    if kind == "safetensors":
        written = write_tensors(folder / WEIGHTS, weights.shapes, weights)
        return {"weights": WEIGHTS, "prefix": "", "files": {WEIGHTS: written}}
    return diffusers_folder.write(folder, config, about, weights)
