"""The evaluation worker: a process beside training that scores published snapshots.

Newest first: the snapshot people wait for, above all the final one, never queues behind older ones; those fill the
curves when there is time. Training never waits. A killed worker loses at most the snapshot at hand, and several share
a run.
"""

import json
import time
from pathlib import Path
from typing import NamedTuple

import torch

from sctrain.config.schema import RunConfig
from sctrain.errors import UserError
from sctrain.evaluation.publishing import update_metrics, write_pictures, write_tensorboard
from sctrain.evaluation.queue import Claim, OvertakenError, claim, is_done
from sctrain.evaluation.scoring import Evaluation, Judge, evaluate_snapshot
from sctrain.reporting.console import say
from sctrain.reporting.grids import GRID_COLUMNS
from sctrain.runs import RunFolder, numbered
from sctrain.snapshots import snapshot_config

POLL_SECONDS = 2.0


class Task(NamedTuple):
    """A claimed snapshot."""

    images: int
    config: RunConfig
    claim: Claim


def evaluate(run: Path, *, watch: bool, device: str | None = None) -> int:
    """Evaluate the snapshots of `run` that nobody else has; how many this worker did.

    `watch` waits for a run that has not begun, and goes on until training has finished, or is stopped meanwhile, and
    every snapshot is done. `device` None is the GPU where there is one.
    """
    if not watch and not run.is_dir():
        raise UserError(f"{run} is not a run folder; give the run_dir of a training run")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    worker = Worker(RunFolder(run), torch.device(device))
    update_metrics(worker.run)
    evaluated = 0
    if not run.is_dir():
        say(f"waiting for {run} to begin")
    while True:
        ended = worker.training_ended()  # asked before looking for work: nothing can be published in between
        task = worker.next_task()
        if task is not None:
            evaluated += worker.carry_out(task)
        elif not watch or (ended and worker.all_done()):
            return evaluated
        else:
            time.sleep(POLL_SECONDS)


class Worker:
    """A run, a device, and what all its snapshots are scored against."""

    def __init__(self, run: RunFolder, device: torch.device):
        self.run, self.device = run, device
        self._judges: dict[tuple[str, int], Judge] = {}
        self._first_status = self._status()

    def training_ended(self) -> bool:
        """Whether training finished, or was stopped while this worker watched: one stopped before may go on."""
        status = self._status()
        return status is not None and (
            status[0] == "finished" or (status[0] == "stopped" and status != self._first_status)
        )

    def _status(self) -> tuple[str, int] | None:
        """State and time of writing of status.json."""
        path = self.run.status
        return (json.loads(path.read_text())["state"], path.stat().st_mtime_ns) if path.is_file() else None

    def next_task(self) -> Task | None:
        """The newest snapshot that is neither done nor claimed, claimed now."""
        for images, snapshot in reversed(numbered(self.run.snapshots)):
            folder = self.run.evaluations / snapshot.name
            if is_done(folder):
                continue
            config = snapshot_config(self.run.root, images)
            mine = claim(folder, config.evaluation.claim_seconds)
            if mine is not None:
                return Task(images, config, mine)
        return None

    def all_done(self) -> bool:
        return all(is_done(self.run.evaluations / path.name) for _, path in numbered(self.run.snapshots))

    def carry_out(self, task: Task) -> bool:
        """Evaluate and publish; False, with one sentence, where another worker overtook this one."""
        try:
            with task.claim.kept(task.config.evaluation.claim_seconds):
                evaluation = self._evaluate(task)
                self._publish(task, evaluation)
        except OvertakenError as error:
            say(str(error))
            return False
        update_metrics(self.run)
        say(summary(task.images, evaluation))
        return True

    def _evaluate(self, task: Task) -> Evaluation:
        teacher = task.config.evaluation.ode_teacher or task.config.teacher
        judge, run = self._judge(task.config), self.run.root
        return evaluate_snapshot(run, task.images, task.config, judge, self.device, teacher, task.claim.check)

    def _publish(self, task: Task, evaluation: Evaluation) -> None:
        """The result last: its presence says that everything else is there."""
        columns = min(GRID_COLUMNS, self._judge(task.config).num_classes)
        grids = write_pictures(task.claim.folder, evaluation, columns)
        write_tensorboard(self.run, task.images, evaluation, grids)
        task.claim.publish({"images": task.images, "lines": evaluation.lines})

    def _judge(self, config: RunConfig) -> Judge:
        key = (config.data.url, config.evaluation.samples)
        if key not in self._judges:
            self._judges[key] = Judge.of(config, self.run.evaluations, self.device)
        return self._judges[key]


def summary(images: int, evaluation: Evaluation) -> str:
    """One line for the person who watches."""
    parts = [
        f"{line['sampler']} {line['steps']}: FD {line['fd']:.3f}, agreement {line['agreement']:.1%}"
        for line in evaluation.lines
        if (line["ema"], line["seed"]) == (evaluation.lines[0]["ema"], evaluation.lines[0]["seed"])
    ]
    return f"evaluated the snapshot at {images:,} images: " + "; ".join(parts)
