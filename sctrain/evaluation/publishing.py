"""What a worker leaves behind for readers: grids, raw pictures, TensorBoard points and metrics.jsonl.

metrics.jsonl is a view of all metrics.json, so evaluating a snapshot again replaces its lines, and workers on several
machines need no lock.
"""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save
from torch.utils.tensorboard import SummaryWriter

from sctrain.evaluation.queue import is_done, read_result
from sctrain.evaluation.scoring import REAL, Evaluation
from sctrain.files import write_bytes
from sctrain.reporting.grids import image_grid
from sctrain.runs import RunFolder, numbered

PICTURES = "pictures.safetensors"
SCALARS = ("fd", "agreement", "precision", "recall", "nn_ratio", "ode_mse")


def write_pictures(folder: Path, evaluation: Evaluation, columns: int) -> dict[str, Image.Image]:
    """One enlarged grid per sampler, and the raw images for the report; the grids by name."""
    write_bytes(folder / PICTURES, save({name: images.contiguous() for name, images in evaluation.pictures.items()}))
    grids = {name: image_grid(images, columns) for name, images in evaluation.pictures.items()}
    for name, grid in grids.items():
        buffer = io.BytesIO()
        grid.save(buffer, "PNG")
        write_bytes(folder / f"grid-{name}.png", buffer.getvalue())
    return grids


def write_tensorboard(run: RunFolder, images: int, evaluation: Evaluation, grids: dict[str, Image.Image]) -> None:
    """Points at `images`, in an event file of their own: TensorBoard never looks back at an older file."""
    with SummaryWriter(str(run.tensorboard / "evaluation")) as writer:
        for tag, values in _scalars(evaluation).items():
            writer.add_scalar(tag, sum(values) / len(values), images)
        for name, grid in grids.items():
            if name != REAL:
                writer.add_image(f"samples/{name}", np.asarray(grid), images, dataformats="HWC")


def _scalars(evaluation: Evaluation) -> dict[str, list[float]]:
    """Values of all seeds by tag; the EMA width is part of the tag where there are several."""
    several = len({line["ema"] for line in evaluation.lines}) > 1
    scalars: dict[str, list[float]] = {}
    for line in evaluation.lines:
        suffix = f"_ema{line['ema']:g}" if several else ""
        for name in SCALARS:
            if line[name] is not None:
                scalars.setdefault(f"{name}/{line['sampler']}-{line['steps']}{suffix}", []).append(line[name])
    return scalars


def update_metrics(run: RunFolder) -> None:
    """Rewrite metrics.jsonl from the results, again if one came in meanwhile: the last of several writers is right."""
    if not run.evaluations.is_dir():
        return
    written: list[Path] | None = None
    while written != (done := _done(run)):
        lines = [json.dumps(line) + "\n" for folder in done for line in read_result(folder)["lines"]]
        write_bytes(run.metrics, "".join(lines).encode())
        written = done


def _done(run: RunFolder) -> list[Path]:
    return [folder for _, folder in numbered(run.evaluations) if is_done(folder)]
