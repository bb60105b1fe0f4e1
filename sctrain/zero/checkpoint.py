"""Checkpoints: sharded, asynchronous, atomic, verified, and loadable on any number of ranks.

    checkpoints/000000032768/rank-00000.safetensors ...   each rank's pieces of every tensor, flat
    checkpoints/000000032768/manifest.json                shapes, cuts, checksums and the trainer's record

A save copies the pieces into staging buffers and returns; one thread per rank writes them. The threads never communicate
through the process group (a collective off the main thread would interleave with training's): each rank leaves a sidecar
in the partial folder, and rank 0 seals the checkpoint when all are there.

Why not torch.distributed.checkpoint: its metadata is a pickle, which runs code when read, and a rank's pieces are
one-dimensional intervals, whose resharding is the dozen lines of `_read`.
"""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sctrain.errors import UserError
from sctrain.runs import image_count_name, numbered
from sctrain.sealed_folder import (
    describe_file,
    flush,
    partial_folder,
    read_manifest,
    remove_partial_folders,
    retire,
    seal,
    verified,
    write_json,
)
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
    """Values of the wanted pieces, one at a time on the CPU; empty pieces are left out.

    The pieces may be cut for another number of ranks than the one that saved. All checks come before the first value.

    Args:
        path: of a checkpoint.
        wanted: this rank's pieces by key; only their shapes and intervals are read. The keys must be those stored.

    Raises:
        UserError: a file is missing or corrupt, or the checkpoint belongs to another network.
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
    with contextlib.ExitStack() as stack:
        shards = {rank: stack.enter_context(safe_open(path, "pt")) for rank, path in files.items()}
        for key, piece in wanted.items():
            overlaps = _overlaps(stored[key]["cuts"], piece)
            if parts := [shards[rank].get_slice(key)[start:stop] for rank, start, stop in overlaps]:
                yield key, torch.cat(parts)


def _overlaps(cuts: list[int], piece: Piece) -> Iterator[tuple[int, int, int]]:
    """(rank, start, stop) of each stored piece that the wanted one overlaps, counted from the stored one's start."""
    for rank, (first, last) in enumerate(zip(cuts, cuts[1:], strict=False)):
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

    An error of the background thread is raised by the next call. Staging buffers are kept: they cost each rank as much
    host memory as its pieces.
    """

    def __init__(self, folder: Path, keep: int, rank: int, world: int, patience_seconds: float = 1800.0):
        """Remove what an interrupted run left behind, on rank 0: a barrier or a training step has to follow before `save`.

        Args:
            folder: of all checkpoints of the run, shared by the ranks.
            keep: how many checkpoints stay; at least 1.
            rank: of this process.
            world: number of ranks.
            patience_seconds: how long rank 0 waits for the other ranks' parts.

        Raises:
            UserError: the folder cannot be written.
        """
        assert keep >= 1 and 0 <= rank < world, (keep, rank, world)
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
        """Begin to save; waits for the previous save first. A count of images that is already saved is left as it is.

        Args:
            images: seen so far; names the checkpoint.
            tensors: this rank's pieces. They may change as soon as this returns.
            record: anything JSON that `read_record` shall return; rank 0's is stored.

        Returns:
            Seconds that training stood still.
        """
        begin = time.perf_counter()
        self.wait()
        if images != self._newest:
            self._newest = images
            self._stage(tensors)
            intervals = {key: (piece.start, piece.stop) for key, piece in tensors.items()}
            shapes = {key: piece.shape for key, piece in tensors.items()}
            manifest = {"images": images, "world": self.world, "tensors": shapes, "record": record}
            final = self.folder / image_count_name(images)
            self._thread = threading.Thread(target=self._work, args=(final, intervals, manifest), daemon=True)
            self._thread.start()
        return time.perf_counter() - begin

    def wait(self) -> None:
        """Return when this rank has nothing left to write.

        Raises:
            UserError: the save failed; older checkpoints are untouched.
        """
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
            if self.rank == 0:
                self._complete(final, manifest)
        except Exception as error:
            self._error = _explain(error, final)
            self._give_up(partial)

    def _write_shard(self, partial: Path, intervals: Mapping[str, tuple[int, int]]) -> None:
        partial.mkdir(exist_ok=True)
        path = partial / _shard_name(self.rank)
        save_file(self._staging, path)
        flush(path)
        write_json(partial / _sidecar_name(self.rank), {"file": describe_file(path), "intervals": intervals})

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
        deadline, missing = time.monotonic() + self._patience, list(range(self.world))
        while missing := [rank for rank in missing if not (partial / _sidecar_name(rank)).exists()]:
            if failed := [rank for rank in missing if (partial / _failure_name(rank)).exists()]:
                raise OSError(f"rank {failed[0]} could not write its part, see its message")
            if time.monotonic() > deadline:
                raise OSError(f"rank {missing[0]} wrote nothing within {self._patience:g} s")
            time.sleep(POLL_SECONDS)
        return [json.loads((partial / _sidecar_name(rank)).read_text()) for rank in range(self.world)]

    def _give_up(self, partial: Path) -> None:
        """Rank 0 clears the attempt away; the others free their space and tell rank 0."""
        with contextlib.suppress(OSError):  # the first error is the one to report
            if self.rank == 0:
                shutil.rmtree(partial)
            else:
                (partial / _shard_name(self.rank)).unlink(missing_ok=True)
                (partial / _failure_name(self.rank)).touch()


def _explain(error: Exception, final: Path) -> Exception:
    if not isinstance(error, OSError | SafetensorError):
        return error
    mend = "make room or allow writing there, then repeat the command"
    told = UserError(f"{final} could not be saved ({error}), older checkpoints are untouched: {mend}")
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
