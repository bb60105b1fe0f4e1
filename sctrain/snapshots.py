"""Published EMA weights for readers: evaluation workers, sampling, teachers, other runs.

    snapshots/000000032768/ema-0.05.safetensors ...   one file per track, whole tensors by parameter name
    snapshots/000000032768/manifest.json              count of images, widths, resolved configuration, shapes, checksums

A snapshot is complete and verified, or it does not exist. Widths that were not tracked are reconstructed post hoc from
all tracks stored so far (EDM2 section 3.2).
"""

import itertools
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from sctrain.config.schema import RunConfig
from sctrain.errors import UserError
from sctrain.power_ema import gamma_from_width, posthoc_coefficients, unexplained
from sctrain.provenance import code_version
from sctrain.runs import RunFolder, image_count_name, numbered
from sctrain.sealed_folder import partial_folder, read_manifest, seal, verified
from sctrain.tensor_file import TensorFile, write_tensors

MAX_UNEXPLAINED = 0.1  # of the profile's energy
_AT_ONCE = 2**20  # elements that are summed in float64
NEGLIGIBLE = 1e-9  # coefficients below it change no fp32 weight, and need no reading


def publish(
    folder: Path,
    images: int,
    tracks: Mapping[float, Iterable[tuple[str, Tensor]]],
    config: dict[str, Any],
    shapes: Mapping[str, Sequence[int]],
) -> Path:
    """Store the tracks after `images` > 0 images, and return their folder; UserError if it cannot be written.

    `tracks` holds, for each relative width, whole tensors by parameter name in the order of `shapes`. They are consumed
    one tensor at a time, and always, since gathering them takes the other ranks too. A snapshot that was published
    before a resume stays. `config` is the resolved run description, JSON.
    """
    assert images > 0, "a power-function average needs a history"
    final = folder / image_count_name(images)
    partial, files, left = partial_folder(final), {}, {width: iter(track) for width, track in tracks.items()}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for width, track in left.items():
            files[_file_name(width)] = write_tensors(partial / _file_name(width), shapes, track)
        if final.exists():
            shutil.rmtree(partial)
        else:
            content = {"images": images, "widths": list(tracks), "config": config, "files": files}
            content["code"] = code_version()
            seal(final, content | {"tensors": {name: list(shape) for name, shape in shapes.items()}})
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        for _ in itertools.chain.from_iterable(left.values()):
            pass
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


class StoredWeights:
    """EMA weights of one width in published snapshots: a weighted sum of stored tracks, read piece by piece."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], terms: Sequence[tuple[float, Path]], prefix: str = ""):
        """`terms` are (weight, verified file), in which names begin with `prefix`."""
        self._prefix = prefix
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._terms = [(weight, TensorFile(path)) for weight, path in terms]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """(stop - start,) float32 on the CPU: that interval of the flattened parameter, summed in float64."""
        (first, file), *others = self._terms
        if first == 1 and not others:
            return file.read(self._prefix + name, start, stop)
        total = torch.zeros(stop - start, dtype=torch.float64)
        for weight, file in self._terms:
            total.add_(file.read(self._prefix + name, start, stop), alpha=weight)
        return total.float()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole float32 tensor), in the order of `shapes`; none of them is held on to."""
        return ((name, self._whole(name)) for name in self.shapes)

    def _whole(self, name: str) -> Tensor:
        whole = torch.empty(math.prod(self.shapes[name]))
        for start in range(0, len(whole), _AT_ONCE):
            piece = whole[start : start + _AT_ONCE]
            piece.copy_(self.read(name, start, start + len(piece)))
        return whole.view(self.shapes[name])


def open_weights(folder: Path, images: int | None, width: float) -> StoredWeights:
    """EMA weights of the snapshot at `images` (None: the newest).

    A relative width in (0, 0.288) that is not a track of the snapshot is reconstructed from all snapshots up to it.
    UserError if there is no such snapshot, or a file is missing or corrupt.
    """
    history = _history(folder, images)
    target, manifest = history[-1]
    if width in manifest["widths"]:
        file = verified(target, _file_name(width), manifest, _mend(target))
        return StoredWeights(manifest["tensors"], [(1.0, file)])
    return _reconstruct(history, width)


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


def _reconstruct(history: list[tuple[Path, dict[str, Any]]], width: float) -> StoredWeights:
    """The weighted sum of stored tracks that lies nearest to the width."""
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
    shapes, terms = newest_manifest["tensors"], []
    for (path, manifest, track), coefficient in zip(tracks, coefficients, strict=True):
        if manifest["tensors"] != shapes:
            raise UserError(f"{path} and {target} are of different networks: move the one of another run away")
        if abs(coefficient) > NEGLIGIBLE:
            terms.append((coefficient, verified(path, _file_name(track), manifest, _mend(path))))
    return StoredWeights(shapes, terms)


def _mend(path: Path) -> str:
    return f"delete the folder {path}; the run's other snapshots and its checkpoints do not need it"


def _file_name(width: float) -> str:
    return f"ema-{width}.safetensors"
