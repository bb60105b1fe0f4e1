"""Checkpoints: sharded, asynchronous, atomic, verified, and loadable on any number of ranks.

    checkpoints/000000032768/rank-00000.safetensors ...   each rank's pieces of every tensor, flat
    checkpoints/000000032768/manifest.json                shapes, cuts, checksums and the trainer's record

A save copies the pieces into staging buffers and returns; one thread per rank writes them. The threads never use the
process group (a collective off the main thread would interleave with training's): each rank leaves a sidecar in the
partial folder, and rank 0 seals the checkpoint when all are there.

Why not torch.distributed.checkpoint: its metadata is a pickle, which runs code when read, and a rank's pieces are
one-dimensional intervals, whose resharding is the dozen lines of `_read` and `_overlaps`.
"""

import contextlib
import itertools
import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sctrain.errors import OwnUserError, UserError
from sctrain.files import write_json
from sctrain.runs import image_count_name, numbered
from sctrain.sealed_folder import (
    partial_folder,
    read_manifest,
    remove_partial_folders,
    retire,
    seal,
    verified,
)
from sctrain.tensor_file import TensorFile, write_tensors
from sctrain.zero.memory import Memory
from sctrain.zero.pieces import Piece

POLL_SECONDS = 0.05


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`."""
    found = numbered(folder)
    return found[-1][1] if found else None


def read_record(path: Path) -> dict[str, Any]:
    """What the trainer stored beside the tensors of the checkpoint at `path`."""
    return read_manifest(path, _mend(path))["record"]


def load(path: Path, wanted: Mapping[str, Piece]) -> Iterator[tuple[str, Tensor]]:
    """Values of the wanted pieces by key, one at a time on the CPU; empty pieces are left out.

    Of `wanted` only shapes and intervals count, which may be cut for another number of ranks than saved; its keys must
    be those stored. All checks come before the first value: UserError if a file is missing or corrupt, or if the
    checkpoint belongs to another network.
    """
    manifest = read_manifest(path, _mend(path))
    stored: dict[str, dict[str, Any]] = manifest["tensors"]
    _check_same_tensors(path, stored, wanted)
    ranks = {rank for key, piece in wanted.items() for rank, _, _ in _overlaps(stored[key]["cuts"], piece)}
    names = {rank: verified(path, _shard_name(rank), manifest, _mend(path)) for rank in sorted(ranks)}
    return _read(names, stored, wanted)


def _read(
    files: Mapping[int, Path], stored: Mapping[str, dict[str, Any]], wanted: Mapping[str, Piece]
) -> Iterator[tuple[str, Tensor]]:
    shards = {rank: TensorFile(path) for rank, path in files.items()}
    for key, piece in wanted.items():
        overlaps = _overlaps(stored[key]["cuts"], piece)
        if parts := [shards[rank].read(key, start, stop) for rank, start, stop in overlaps]:
            yield key, torch.cat(parts) if len(parts) > 1 else parts[0]


def _overlaps(cuts: list[int], piece: Piece) -> Iterator[tuple[int, int, int]]:
    """(rank, start, stop) of each stored piece that the wanted one overlaps, counted from the stored one's start."""
    for rank, (first, last) in enumerate(itertools.pairwise(cuts)):
        start, stop = max(first, piece.start), min(last, piece.stop)
        if start < stop:
            yield rank, start - first, stop - first


def _check_same_tensors(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Piece]) -> None:
    mend = "resume with the configuration of the run, or choose another run_dir"
    for key in [*wanted, *stored]:
        if key not in stored or key not in wanted:
            where = "the run" if key in wanted else "the checkpoint"
            raise UserError(f"{path} is of another network, optimizer or EMA: {key} is only in {where}; {mend}")
        if tuple(stored[key]["shape"]) != wanted[key].shape:
            shapes = f"{stored[key]['shape']}, the run's {list(wanted[key].shape)}"
            raise UserError(f"{path} is of another network: its {key} has shape {shapes}; {mend}")


def _mend(path: Path) -> str:
    """What to do about a damaged checkpoint."""
    older = [other.name for _, other in numbered(path.parent) if other.name < path.name]
    return f"delete the folder {path} to " + (f"fall back on {older[-1]}" if older else "start anew (none is older)")


class Checkpointer:
    """Saves checkpoints of a run in the background; every rank has one.

    Construct it on every rank before the first training step, which keeps rank 0's cleaning apart from saves. An error
    of the background thread is raised by the next call. The staging buffers stay, and cost as much host memory as the
    pieces.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        rank: int,
        world: int,
        *,
        patience_seconds: float = 1800.0,
        copies: bool = True,
        memory: Memory | None = None,
    ):
        """Remove what an interrupted run left in `folder`, which all ranks share; UserError if it cannot be written.

        Only the `keep` newest checkpoints stay. Rank 0 waits at most `patience_seconds` for the other ranks' parts.
        Without `copies` training waits until they are written, piece by piece out of `memory`.
        """
        assert keep >= 1 and 0 <= rank < world, (keep, rank, world)
        self._copies, self._memory = copies, memory or Memory()
        self.folder, self.keep, self.rank, self.world = folder, keep, rank, world
        self._patience = patience_seconds
        self._staging: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._newest = max((images for images, _ in numbered(folder)), default=-1)
        if rank == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                remove_partial_folders(folder)
            except OSError as error:
                raise UserError(f"{folder} cannot be written ({error}): allow it or choose another run_dir") from error

    def save(self, images: int, tensors: Mapping[str, Piece], record: dict[str, Any]) -> float:
        """Begin to save, after the previous save is done; return the seconds that training stood still.

        `tensors`, this rank's pieces, may change as soon as this returns. `record` is anything JSON that `read_record`
        shall return (rank 0's counts). A count of images that is already saved is left as it is.
        """
        begin = time.perf_counter()
        self.wait()
        if images != self._newest:
            self._newest = images
            if self._copies:
                self._stage(tensors)
            else:
                self._staging = {key: piece.local for key, piece in tensors.items()}
            intervals = {key: (piece.start, piece.stop) for key, piece in tensors.items()}
            shapes = {key: piece.shape for key, piece in tensors.items()}
            manifest = {"images": images, "world": self.world, "tensors": shapes, "record": record}
            final = self.folder / image_count_name(images)
            self._thread = threading.Thread(target=self._work, args=(final, intervals, manifest), daemon=True)
            self._thread.start()
            if not self._copies:
                self._thread.join()
                self._staging = {}
        return time.perf_counter() - begin

    @property
    def failed(self) -> bool:
        """Whether the save under way or the last one has failed on this rank: `wait` will raise."""
        return self._error is not None

    def wait(self) -> None:
        """Return when this rank has nothing left to write; UserError if it failed, older checkpoints are untouched."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _stage(self, tensors: Mapping[str, Piece]) -> None:
        """Copy the pieces, which are views of ZeRO's buffers, to the host."""
        kept, self._staging = self._staging, {}
        for key, piece in tensors.items():
            pin = piece.local.is_cuda
            buffer = kept[key] if key in kept else torch.empty_like(piece.local, device="cpu", pin_memory=pin)
            self._staging[key] = buffer.copy_(piece.local, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _work(self, final: Path, intervals: Mapping[str, tuple[int, int]], manifest: dict[str, Any]) -> None:
        partial = partial_folder(final)
        try:
            self._write_shard(partial, intervals)
        except Exception as error:
            self._error = _explain(error, final)
            self._leave_failure(partial)
        if self.rank == 0:
            try:
                self._complete(final, manifest)
            except Exception as error:
                self._error = self._error or _explain(error, final)
                shutil.rmtree(partial, ignore_errors=True)

    def _write_shard(self, partial: Path, intervals: Mapping[str, tuple[int, int]]) -> None:
        partial.mkdir(exist_ok=True)
        shapes = {key: tuple(values.shape) for key, values in self._staging.items()}
        written = write_tensors(partial / _shard_name(self.rank), shapes, self._pieces())
        write_json(partial / _sidecar_name(self.rank), {"file": written, "intervals": intervals})

    def _pieces(self) -> Iterator[tuple[str, Tensor]]:
        for key, values in self._staging.items():
            yield key, values
            self._memory.relieve(values.nbytes)

    def _complete(self, final: Path, manifest: dict[str, Any]) -> None:
        partial = partial_folder(final)
        sidecars = self._await_sidecars(partial)
        manifest["files"] = {_shard_name(rank): sidecar["file"] for rank, sidecar in enumerate(sidecars)}
        manifest["tensors"] = {
            key: {"shape": shape, "cuts": _cuts([sidecar["intervals"][key] for sidecar in sidecars])}
            for key, shape in manifest["tensors"].items()
        }
        for rank in range(self.world):
            (partial / _sidecar_name(rank)).unlink()
        seal(final, manifest)
        for _, old in numbered(self.folder)[: -self.keep]:
            retire(old)

    def _await_sidecars(self, partial: Path) -> list[dict[str, Any]]:
        """Every rank's sidecar, after all ranks are done with the folder."""
        deadline, ranks = time.monotonic() + self._patience, range(self.world)
        while missing := [rank for rank in ranks if not _is_done(partial, rank)]:
            if not partial.exists():
                raise OSError("its folder is missing")
            if time.monotonic() > deadline:
                raise OSError(f"rank {missing[0]} wrote nothing within {self._patience:g} s")
            time.sleep(POLL_SECONDS)
        if failed := [rank for rank in ranks if (partial / _failure_name(rank)).exists()]:
            raise OSError(f"rank {failed[0]} could not write its part, see its message")
        return [json.loads((partial / _sidecar_name(rank)).read_text()) for rank in ranks]

    def _leave_failure(self, partial: Path) -> None:
        """Free the space and tell rank 0, as far as the disk allows: the error itself is told by the next call."""
        with contextlib.suppress(OSError):
            (partial / _shard_name(self.rank)).unlink(missing_ok=True)
            (partial / _failure_name(self.rank)).touch()


def _is_done(partial: Path, rank: int) -> bool:
    return (partial / _sidecar_name(rank)).exists() or (partial / _failure_name(rank)).exists()


def _explain(error: Exception, final: Path) -> Exception:
    if not isinstance(error, OSError):
        return error
    mend = "make room or allow writing there, then repeat the command"
    told = OwnUserError(f"{final} could not be saved ({error}), older checkpoints are untouched: {mend}")
    told.__cause__ = error
    return told


def _cuts(intervals: list[list[int]]) -> list[int]:
    """Borders between the ranks' intervals, which follow each other: rank r holds [cuts[r], cuts[r + 1])."""
    cuts = [0, *(stop for _, stop in intervals)]
    assert cuts[:-1] == [start for start, _ in intervals], f"the ranks' intervals {intervals} leave gaps"
    return cuts


def _shard_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _sidecar_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _failure_name(rank: int) -> str:
    return f"rank-{rank:05d}.failed"
