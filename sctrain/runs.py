"""The layout of a run folder, in one place."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run.

    run/
      config.yaml                 the resolved description
      status.json                 {"state": "running" | "finished" | "stopped", "images": int, "wall_seconds": float}
      stats.jsonl                 one line of training scalars per status interval
      metrics.jsonl               one line per evaluated (snapshot, EMA width, seed, sampler, steps)
      rollback.json               the last return to a checkpoint, if there was one
      checkpoints/000000032768/   sharded training state; complete or absent
      snapshots/000000032768/     EMA weights for readers; complete or absent
      evaluations/000000032768/   claim, metrics.json, grids of one snapshot
      tensorboard/                train, evaluation
      offload/                    looks empty: what training keeps on the disk has no names
    """

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def stats(self) -> Path:
        return self.root / "stats.jsonl"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def rollback(self) -> Path:
        return self.root / "rollback.json"

    @property
    def offload(self) -> Path:
        return self.root / "offload"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def snapshots(self) -> Path:
        return self.root / "snapshots"

    @property
    def evaluations(self) -> Path:
        return self.root / "evaluations"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    def scores(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, oldest snapshot first; none before one was scored."""
        return [json.loads(line) for line in self.metrics.read_text().splitlines()] if self.metrics.is_file() else []

    def saved_config(self) -> dict[str, Any]:
        """The description this run was last started with."""
        return yaml.safe_load(self.config.read_text())


def image_count_name(images: int) -> str:
    """Folder name of the state after `images` images; sorts by age."""
    return f"{images:012d}"


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """(images, path) of each complete entry of checkpoints/, snapshots/ or evaluations/, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((int(path.name), path) for path in folder.iterdir() if path.name.isdigit())


def is_finished(run: RunFolder) -> bool:
    """Whether the run has used up its budget."""
    return run.status.is_file() and json.loads(run.status.read_text())["state"] == "finished"
