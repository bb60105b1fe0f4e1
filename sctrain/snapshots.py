"""Published EMA weights for readers: evaluation workers, sampling, teachers, other runs.

    snapshots/000000032768/ema-0.05.safetensors ...   one file per track, whole tensors by parameter name
    snapshots/000000032768/manifest.json              count of images, widths, resolved configuration, shapes, checksums

A snapshot is complete and verified, or it does not exist. Widths that were not tracked are reconstructed post hoc from
all tracks stored so far (EDM2 section 3.2).
"""

import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sctrain.config.schema import RunConfig
from sctrain.errors import UserError
from sctrain.power_ema import gamma_from_width, posthoc_coefficients, unexplained
from sctrain.provenance import code_version
from sctrain.runs import RunFolder, image_count_name, numbered
from sctrain.sealed_folder import describe_file, flush, partial_folder, read_manifest, seal, verified

MAX_UNEXPLAINED = 0.1  # of the profile's energy
_AT_ONCE = 2**20  # elements that are summed in float64
NEGLIGIBLE = 1e-9  # coefficients below it change no fp32 weight, and need no reading


def publish(
    folder: Path, images: int, tracks: Mapping[float, Iterable[tuple[str, Tensor]]], config: dict[str, Any]
) -> Path:
    """Store the tracks after `images` > 0 images, and return their folder; UserError if it cannot be written.

    `tracks` holds whole tensors by parameter name for each relative width. They are consumed one track at a time, and
    always, since gathering them takes the other ranks too. A snapshot that was published before a resume stays.
    `config` is the resolved run description, JSON.
    """
    assert images > 0, "a power-function average needs a history"
    final = folder / image_count_name(images)
    partial, manifest = partial_folder(final), {"images": images, "widths": list(tracks), "config": config}
    manifest["code"] = code_version()
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for width, track in tracks.items():
            tensors = dict(track)
            save_file(tensors, partial / _file_name(width))
            flush(partial / _file_name(width))
            manifest["tensors"] = {name: list(tensor.shape) for name, tensor in tensors.items()}
        manifest["files"] = {name: describe_file(partial / name) for name in map(_file_name, tracks)}
        if final.exists():
            shutil.rmtree(partial)
        else:
            seal(final, manifest)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        mend = "make room or allow writing there, then repeat the command"
        raise UserError(f"{final} could not be written ({error}): {mend}") from error
    return final


def newest(folder: Path) -> Path | None:
    """The newest snapshot in `folder`; its name is its count of images."""
    found = numbered(folder)
    return found[-1][1] if found else None


def newest_images(run: Path) -> int:
    """Count of images of the newest snapshot of the run in folder `run`; UserError if it has none."""
    path = newest(RunFolder(run).snapshots)
    if path is None:
        raise UserError(f"{run} has no snapshots; train it first, or name another run")
    return int(path.name)


def read_config(path: Path) -> dict[str, Any]:
    """The resolved run description stored in the snapshot at `path`."""
    return read_manifest(path, _mend(path))["config"]


def snapshot_config(run: Path, images: int) -> RunConfig:
    """The description that the snapshot of `run` at `images` was trained with."""
    path = RunFolder(run).snapshots / image_count_name(images)
    try:
        return RunConfig.model_validate(read_config(path))
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"{path} was published by another version of sctrain, whose description differs at '{key}': "
            "use that version, or train the run again"
        ) from error


@dataclass(frozen=True)
class EmaWeights:
    """One EMA of a network, a weighted sum of stored files, made tensor by tensor: no more than one is in memory.

    Iterating gives (name, float32 tensor on the CPU) in the order of `shapes`.
    """

    shapes: dict[str, list[int]]
    terms: tuple[tuple[Path, float], ...]  # files that were verified, and their coefficients

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        with ExitStack() as opened:
            files = [(opened.enter_context(safe_open(path, framework="pt")), factor) for path, factor in self.terms]
            for name, shape in self.shapes.items():
                yield name, _weighted_sum([(file.get_slice(name), factor) for file, factor in files], shape)


def open_weights(folder: Path, images: int | None, width: float) -> EmaWeights:
    """EMA weights of the snapshot at `images` (None: the newest), every file checked, none read into memory.

    A relative width in (0, 0.288) that is not a track of the snapshot is reconstructed from all snapshots up to it.
    UserError if there is no such snapshot, or a file is missing or corrupt.
    """
    history = _history(folder, images)
    target, manifest = history[-1]
    stored = width in manifest["widths"]
    chosen = [(target, manifest, width, 1.0)] if stored else _reconstruction(history, width)
    terms = [(verified(path, _file_name(track), about, _mend(path)), factor) for path, about, track, factor in chosen]
    return EmaWeights(manifest["tensors"], tuple(terms))


def load_weights(folder: Path, images: int | None, width: float) -> dict[str, Tensor]:
    """`open_weights`, all of them in memory, by parameter name."""
    return dict(open_weights(folder, images, width))


def _history(folder: Path, images: int | None) -> list[tuple[Path, dict[str, Any]]]:
    """(path, manifest) of the snapshots up to the one wanted, oldest first."""
    found = numbered(folder)
    counts = [count for count, _ in found]
    if not found:
        raise UserError(f"{folder} holds no snapshot: train until the first one is published, or name another run")
    if images is not None and images not in counts:
        raise UserError(f"{folder} holds no snapshot at {images} images: choose one of {counts}")
    chosen = [path for count, path in found if images is None or count <= images]
    return [(path, read_manifest(path, _mend(path))) for path in chosen]


def _reconstruction(
    history: list[tuple[Path, dict[str, Any]]], width: float
) -> list[tuple[Path, dict[str, Any], float, float]]:
    """(path, manifest, track, coefficient) of the stored tracks whose weighted sum has this width."""
    tracks = [(path, manifest, stored) for path, manifest in history for stored in manifest["widths"]]
    stored = [(manifest["images"], gamma_from_width(track)) for _, manifest, track in tracks]
    target, newest_manifest = history[-1]
    wanted = (newest_manifest["images"], gamma_from_width(width))
    coefficients = posthoc_coefficients(stored, wanted)
    missed = unexplained(stored, wanted, coefficients)
    if missed > MAX_UNEXPLAINED:
        raise UserError(
            f"{target.parent} cannot give an EMA of width {width:g}: its snapshots miss {missed:.0%} of that profile; "
            f"choose a width near {newest_manifest['widths']}, or publish more snapshots"
        )
    for path, manifest, _ in tracks:
        if manifest["tensors"] != newest_manifest["tensors"]:
            raise UserError(f"{path} and {target} are of different networks: move the one of another run away")
    chosen = zip(tracks, coefficients, strict=True)
    return [(*track, coefficient) for track, coefficient in chosen if abs(coefficient) > NEGLIGIBLE]


def _weighted_sum(terms: Sequence[tuple[Any, float]], shape: Sequence[int]) -> Tensor:
    """Of the same tensor in several files, in float64, some rows at a time."""
    if not shape:
        return sum((factor * part[...].double() for part, factor in terms), torch.zeros(()).double()).float()
    out = torch.empty(*shape)
    rows = max(1, _AT_ONCE // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        total = torch.zeros(())
        for part, factor in terms:
            total = part[start : start + rows].double().mul_(factor).add_(total)
        out[start : start + rows] = total
    return out


def _mend(path: Path) -> str:
    return f"delete the folder {path}; the run's other snapshots and its checkpoints do not need it"


def _file_name(width: float) -> str:
    return f"ema-{width}.safetensors"
