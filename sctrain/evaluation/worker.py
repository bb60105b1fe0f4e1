"""The evaluation worker: a process beside training that scores published snapshots.

Newest first: the snapshot people wait for, above all the final one, never queues behind older ones; those fill the curves when
there is time. Training never waits. A killed worker loses at most the snapshot at hand, and any number of them share a run.
"""

import json
import time
from pathlib import Path
from typing import NamedTuple

import torch

from sctrain.config.schema import RunConfig, WeightsFrom
from sctrain.errors import UserError
from sctrain.evaluation.generation import snapshot_config
from sctrain.evaluation.publishing import update_metrics, write_pictures, write_tensorboard
from sctrain.evaluation.queue import Claim, OvertakenError, claim, is_done
from sctrain.evaluation.scoring import Evaluation, Judge, evaluate_snapshot
from sctrain.reporting.console import say
from sctrain.reporting.grids import GRID_COLUMNS
from sctrain.runs import RunFolder, numbered

POLL_SECONDS = 2.0


class Task(NamedTuple):
    """A claimed snapshot."""

    images: int
    config: RunConfig
    claim: Claim


def evaluate(run: Path, *, watch: bool, device: str | None = None, ode_teacher: WeightsFrom | None = None) -> int:
    """Evaluate the snapshots of `run` that nobody else has; how many this worker did.

    `watch` goes on until training has finished or stopped and every snapshot is done. Students are compared with the ODE
    solutions of `ode_teacher`, or of their own teacher where it is None.
    """
    if not watch and not run.is_dir():
        raise UserError(f"{run} is not a run folder; give the run_dir of a training run")
    worker = Worker(
        RunFolder(run), torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")), ode_teacher
    )
    update_metrics(worker.run)
    evaluated = 0
    while True:
        ended = training_ended(worker.run)  # asked before looking for work: nothing can be published in between
        task = worker.next_task()
        if task is not None:
            evaluated += worker.carry_out(task)
        elif not watch or (ended and worker.all_done()):
            return evaluated
        else:
            time.sleep(POLL_SECONDS)


def training_ended(run: RunFolder) -> bool:
    """Whether status.json says that training finished or was stopped."""
    return run.status.is_file() and json.loads(run.status.read_text())["state"] in ("finished", "stopped")


class Worker:
    """A run, a device, and what all its snapshots are scored against."""

    def __init__(self, run: RunFolder, device: torch.device, ode_teacher: WeightsFrom | None):
        self.run, self.device, self.ode_teacher = run, device, ode_teacher
        self._judges: dict[tuple[str, int], Judge] = {}

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
        teacher = self.ode_teacher or task.config.teacher
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
