"""The run folder as the trainer sees it: lock, identity, resume, checkpoints, snapshots, status."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from dataclasses import asdict
from typing import IO

import psutil

from sctrain.config.loading import difference, dump
from sctrain.config.schema import RunConfig
from sctrain.errors import UserError
from sctrain.files import write_json, write_text
from sctrain.record import Record
from sctrain.reporting.console import say
from sctrain.runs import RunFolder, image_count_name, numbered
from sctrain.snapshots import publish
from sctrain.zero.checkpoint import Checkpointer, latest, read_record
from sctrain.zero.ema import ShardedPowerEma
from sctrain.zero.memory import Memory
from sctrain.zero.shards import Shards
from sctrain.zero.state import load_state, save_state
from sctrain.zero.target import TargetNetwork
from sctrain.zero.world import World

# What makes a run the run it is. Anything else may change between two starts, and the change is printed.
_IDENTITY = (
    *("name", "seed", "sigma_data", "noise_input", "network", "objective.name", "teacher", "guide", "optimizer.name"),
    *("ema", "precision", "batch.global_size", "data.mean", "data.std", "data.shuffle_window", "data.flip"),
)


def claim_folder(config: RunConfig, world: World) -> IO[str] | None:
    """Create or adopt the run folder; rank 0 gets its lock. UserError, on every rank, if it is not for this run."""
    lock, refusal = None, None
    if world.is_main:
        try:
            lock = _locked(RunFolder(config.run_dir))
            _refuse_another_run(RunFolder(config.run_dir), config)
        except UserError as error:
            refusal = error
    if world.any(refusal is not None):
        raise refusal or UserError(f"rank 0 cannot use {config.run_dir}")
    return lock


def _locked(folder: RunFolder) -> IO[str]:
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        lock = (folder.root / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{folder.root} cannot be written ({error.strerror}); choose another run_dir") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another process is training in {folder.root}; wait, or choose another run_dir") from error
    return lock


def _refuse_another_run(folder: RunFolder, config: RunConfig) -> None:
    """Print what has changed since the last start; UserError where that makes it another run."""
    changes = difference(folder.saved_config(), config) if folder.config.is_file() else []
    foreign = [change for change in changes if change.startswith(_IDENTITY)]
    if foreign:
        raise UserError(
            f"{folder.root} holds a run of another configuration ({'; '.join(foreign)}); "
            f"choose another run_dir, or restore these keys to continue it"
        )
    for change in changes:
        say(f"changed since this run was last started: {change}")


class RunState:
    """Everything of a run that outlives its processes. All methods are called on every rank."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        lock: IO[str] | None,
        data_fingerprint: str,
        shards: Shards,
        ema: ShardedPowerEma,
        target: TargetNetwork | None,
        beside: Shards | None = None,
        memory: Memory | None = None,
    ):
        """`memory` is relieved of what checkpoints touch."""
        self.config, self.world, self.shards, self.ema = config, world, shards, ema
        self._followers, self._beside = [ema] if target is None else [ema, target], beside
        self.folder = RunFolder(config.run_dir)
        self._fingerprint = data_fingerprint
        self._started = psutil.Process().create_time()  # imports and set-up are part of the price
        self.stall_seconds = 0.0  # how long checkpoints have held training up
        self._lock = lock
        self._wall_before = _wall_seconds(self.folder)
        self._memory = memory
        self._checkpoints = Checkpointer(
            self.folder.checkpoints,
            config.cadence.keep_checkpoints,
            world.rank,
            world.size,
            copies=config.offload.checkpoint_copy,
            memory=memory,
        )

    def resume(self) -> Record:
        """Load the newest checkpoint, if there is one, into engine and EMA."""
        path, record = latest(self.folder.checkpoints), Record()
        if path is not None:
            stored = read_record(path)
            if stored["data_fingerprint"] != self._fingerprint:
                raise UserError(
                    f"{path} was trained on other data than {self.config.data.url} holds now: restore the data, "
                    f"or choose another run_dir"
                )
            load_state(path, self.shards, self._followers, self._beside, self._memory)
            record = self._as_rolled_back(Record.from_json(stored))
        if self.world.is_main:
            self._begin(record)
        self.world.barrier()
        self.running(record.images)
        return record

    def roll_back(self, record: Record) -> Record:
        """Return to the newest checkpoint, and past the samples that led here; the record to go on with."""
        self._checkpoints.wait()
        self.world.barrier()
        path = latest(self.folder.checkpoints)
        if path is None:
            raise UserError(
                f"the gradient's norm spikes before the first checkpoint of {self.folder.root}: lower "
                "optimizer.learning_rate, or set cadence.checkpoint lower"
            )
        self.stall_seconds = 0.0
        back = record.rolled_back_to(Record.from_json(read_record(path)))
        if self.world.is_main:
            write_json(self.folder.rollback, asdict(back))
            say(f"the gradient's norm spiked {len(record.recent_spikes)} times: back from {record.images} images")
        self.world.barrier()
        return self.resume()

    def _as_rolled_back(self, record: Record) -> Record:
        """A return to this very checkpoint is remembered beside it, for checkpoints never change."""
        if not self.folder.rollback.is_file():
            return record
        noted = Record.from_json(json.loads(self.folder.rollback.read_text()))
        return noted if noted.images == record.images and noted.rollbacks > record.rollbacks else record

    def _begin(self, record: Record) -> None:
        """Forget what an abandoned future of this run left behind: readers must not take it for ours."""
        for parent in (self.folder.snapshots, self.folder.evaluations):
            for images, path in numbered(parent):
                if images > record.images:
                    shutil.rmtree(path)
        write_text(self.folder.config, dump(self.config))
        if record.images:
            say(f"resumed {self.folder.root} at {record.images} images")

    def save(self, record: Record) -> None:
        """Start a checkpoint in the background; training stands still only while the shards are copied."""
        about = {"data_fingerprint": self._fingerprint, "config": self.config.model_dump(mode="json")}
        self.stall_seconds += save_state(
            self._checkpoints, record.images, self.shards, self._followers, asdict(record) | about, self._beside
        )

    def publish(self, images: int) -> None:
        """Publish all EMA tracks for readers, unless they are."""
        if (self.folder.snapshots / image_count_name(images)).is_dir():
            return
        tracks = {width: self.ema.gather(width) for width in self.config.ema.widths}
        if self.world.is_main:
            shapes = {shard.name: shard.shape for shard in self.shards}
            publish(self.folder.snapshots, images, tracks, self.config.model_dump(mode="json"), shapes)
        else:
            for track in tracks.values():  # gathering takes every rank
                for _ in track:
                    pass
        self.world.barrier()

    @property
    def failing(self) -> bool:
        """Whether a checkpoint could not be written by this rank; the next save says why."""
        return self._checkpoints.failed

    def running(self, images: int) -> None:
        """Note how far the run is."""
        self._write_status("running", images)

    def finish(self, state: str, images: int) -> None:
        """Wait for the last checkpoint, then note that the run is "finished" or "stopped"."""
        self._checkpoints.wait()
        self.world.barrier()
        self._write_status(state, images)

    def _write_status(self, state: str, images: int) -> None:
        if self.world.is_main:
            wall = self._wall_before + time.time() - self._started
            status = {"state": state, "images": images, "wall_seconds": round(wall, 1), "ranks": self.world.size}
            write_json(self.folder.status, status)

    def close(self) -> None:
        """Release the folder."""
        if self._lock is not None:
            self._lock.close()


def _wall_seconds(folder: RunFolder) -> float:
    """Seconds that earlier starts of this run took."""
    return json.loads(folder.status.read_text())["wall_seconds"] if folder.status.is_file() else 0.0
