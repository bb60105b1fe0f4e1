"""The training run: one visible step, and everything that happens every so many images."""

from __future__ import annotations

import math
from functools import partial

from sctrain import guard
from sctrain.config.schema import RunConfig
from sctrain.monitor import Monitor
from sctrain.objectives.base import Draws, Progress
from sctrain.parts import Parts
from sctrain.reporting.console import StatusLine
from sctrain.reporting.scalars import ScalarWriter
from sctrain.run_state import RunState, claim_folder
from sctrain.schedules import learning_rate
from sctrain.signals import StopRequest
from sctrain.sources import pinned
from sctrain.zero.engine import StepResult
from sctrain.zero.world import World

EXIT_STOPPED = 75  # by a signal, after a checkpoint: the same command goes on


def train(config: RunConfig) -> int:
    """Train until the budget is used up or a signal asks to stop; repeating the call goes on. Returns an exit code."""
    world = World.start(config.runtime)
    config = pinned(config)
    try:
        with StopRequest() as stop, Trainer(config, world, stop) as trainer:
            return trainer.run()
    finally:
        world.stop()


class Trainer:
    """One run, from its newest checkpoint to its budget."""

    def __init__(self, config: RunConfig, world: World, stop: StopRequest):
        self.config, self.world, self.stop = config, world, stop
        lock = claim_folder(config, world)
        self.parts = Parts(config, world)
        self.student = self.parts.student
        self.ema = self.parts.power_ema()
        self.monitor = Monitor(world)
        fingerprint = self.parts.dataset.index.fingerprint
        beside = self.parts.beside and self.parts.beside.shards
        self.state = RunState(
            config,
            world,
            lock,
            fingerprint,
            self.student.shards,
            self.ema,
            self.parts.target,
            beside,
            self.parts.memories.all,
        )
        self.record = self.state.resume()
        self.tangents_unverified = self.parts.has_tangents() and config.guard.check_tangents
        self.look_again = False
        self._open()

    def _open(self) -> None:
        """Data and reports from where the record says."""
        self.batches = self.parts.batches(self.record.position)
        self.scalars = ScalarWriter(self.state.folder, self.images, enabled=self.world.is_main)
        self.status = StatusLine(self.config.budget_images, self.images, enabled=self.world.is_main)

    def _close(self) -> None:
        for part in (self.batches, self.scalars, self.status):
            part.close()

    @property
    def images(self) -> int:
        """Seen so far."""
        return self.record.images

    def run(self) -> int:
        """Step until the budget is used up or a stop is asked for."""
        while self.images < self.config.budget_images:
            self.step()
            if self.world.any(self.stop.received is not None or self.state.failing):
                self.state.save(self.record)
                self.state.finish("stopped", self.images)
                self.status.say(f"saved at {self.images:,} images and stopped by a signal; the same command goes on")
                return EXIT_STOPPED
        self.state.publish(self.images)
        self.state.save(self.record)
        self.state.finish("finished", self.images)
        return 0

    def step(self) -> None:
        """One optimizer step: fetch -> objective -> backward -> step -> weight norm -> EMA -> report."""
        progress, size = Progress(self.images, self.config.budget_images), self.config.batch.global_size
        rate = learning_rate(self.config.optimizer, self.images + size // 2, self.config.budget_images)
        result = None
        while result is None:  # micro-batches of one global batch
            draws = self.parts.draw(next(self.batches), progress)
            if self.tangents_unverified:
                self.verify_tangents(draws)
            loss = self.parts.objective.loss(draws, self.parts.networks)
            self.student.backward(loss.per_sample.mean())
            self.parts.train_beside(loss, rate)
            result = self.student.step(rate, self.accepts)
            self.monitor.add(draws, loss)
        before = self.images
        spike = not result.applied and math.isfinite(result.grad_norm)
        self.record = self.record.after_step(
            size, result.grad_norm, applied=result.applied, spike=spike, window=self.config.guard.spike_window
        )
        if result.applied:
            self.parts.weight_norm.apply()
            self.ema.update(before, self.images)
        after = Progress(self.images, self.config.budget_images)
        self.parts.update_target(progress, after, applied=result.applied)
        self.report(before, rate, result)
        guard.check(self.record, self.config.guard, self.config.run_dir)
        if guard.must_roll_back(self.record, self.config.guard):
            self.roll_back()

    def accepts(self, grad_norm: float) -> bool:
        """Whether a gradient of this norm may move the weights."""
        return not guard.is_spike(grad_norm, self.record, self.config.guard)

    def roll_back(self) -> None:
        """Go on from the last checkpoint, past the samples since."""
        self._close()
        self.record = self.state.roll_back(self.record)
        self._open()

    def verify_tangents(self, draws: Draws) -> None:
        """Refuse to train on wrong tangents. What cannot be verified yet is looked at again with the next report."""
        verdict = self.parts.verify_tangents(draws)
        self.status.say(f"{self.parts.tangent_method()}: {verdict}")
        guard.check_tangents(verdict, self.config.guard)
        self.tangents_unverified = False
        self.look_again = bool(verdict.unverified)

    def report(self, before: int, rate: float, result: StepResult) -> None:
        """Whatever is due between `before` and `self.images`: scalars, snapshot, checkpoint."""
        due = partial(_crossed, before, self.images)
        cadence = self.config.cadence
        if due(cadence.status) or self.images >= self.config.budget_images:
            self._report_scalars(rate, result)
            self.tangents_unverified = self.look_again
        if due(cadence.snapshot):
            self.state.publish(self.images)
        if due(cadence.checkpoint) and not self.record.skipped_in_row:  # a sick state replaces no good one
            self.state.save(self.record)

    def _report_scalars(self, rate: float, result: StepResult) -> None:
        means = self.monitor.means()
        speed = self.status.update(self.images, loss=means["loss/all"], wait_seconds=self.batches.wait_seconds)
        means |= speed | {"speed/checkpoint_stall_seconds": self.state.stall_seconds}
        # Of this rank, since it started.
        means |= {f"data/{name}": value for name, value in self.batches.statistics.items()}
        means |= {"optimizer/learning_rate": rate, "optimizer/grad_norm": result.grad_norm}
        median = guard.median_norm(self.record)
        means |= {"optimizer/grad_norm_median": math.nan if median is None else median}
        counts = ("skipped", "spikes", "rollbacks")
        means |= {f"guard/{name}": float(getattr(self.record, name)) for name in counts}
        means |= {} if self.parts.beside is None else self.parts.beside.report()
        self.scalars.write(self.images, means)
        self.state.running(self.images)
        guard.check_dropped(means["guard/dropped_share"], self.images, self.config.guard)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        self.state.close()


def _crossed(before: int, after: int, every: int) -> bool:
    return before // every < after // every
