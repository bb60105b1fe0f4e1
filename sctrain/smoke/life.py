"""The life of a shrunk recipe in one process, a single rank: trained to the middle, resumed, trained to the end."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.layers import held_parameters
from sctrain import building
from sctrain.config.objectives import Diffusion, SimplifiedConsistency
from sctrain.config.recipes import recipe_of
from sctrain.config.schema import RunConfig
from sctrain.errors import UserError
from sctrain.signals import StopRequest
from sctrain.smoke.data import MOST_CLASSES, described, write_random_images
from sctrain.smoke.shrinking import shrunk
from sctrain.sources import SOURCES, pinned
from sctrain.trainer import EXIT_STOPPED, Trainer
from sctrain.zero.shards import MASTER
from sctrain.zero.world import World


@dataclass(frozen=True)
class Lived:
    """What became of one recipe."""

    parameters: int  # of the full network
    shrunk: RunConfig
    steps: int
    resumed_at: int  # images


@contextmanager
def step(name: str) -> Iterator[None]:
    """Whatever goes wrong inside is a UserError that names the step in one sentence; training's own words are kept."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            yield
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        known = isinstance(error, UserError)
        raise UserError(f"{name}: {reason if known else f'{type(error).__name__}: {reason}'}") from error


def full_parameters(config: RunConfig) -> int:
    """How many the recipe's network has, none of which is made."""
    return sum(math.prod(shape) for shape in building.blueprint(config, described(config)).shapes.values())


class Smoke:
    """Recipes one after the other, in one temporary folder; runs that several build on are trained once."""

    def __init__(self, folder: Path, world: World):
        self._folder, self._world = folder, world
        self._trained: dict[Path, int | UserError] = {}  # images at which each run was resumed, or why it failed

    def live(self, config: RunConfig, name: str) -> Lived:
        """Count, shrink, train, resume; UserError names the step that failed."""
        with step("building the full network on the meta device"):
            parameters = full_parameters(config)
        small = self._shrunk(config, name)
        steps = small.budget_images // small.batch.global_size
        return Lived(parameters, small, steps, self._train(small))

    def _shrunk(self, config: RunConfig, name: str) -> RunConfig:
        """The shrunk recipe, after the runs that it builds on."""
        sources = {}
        for key in SOURCES:
            if (source := getattr(config, key)) is not None:
                with step(f"finding the recipe of {key} {source.run}"):
                    other = recipe_of(source.run, name)
                small = self._shrunk(other, name)
                self._train(small)
                sources[key] = source.model_copy(
                    update={"run": small.run_dir, "ema": small.ema.widths[0], "images": None}
                )
        with step("writing random images"):
            like = described(config)
            data = self._folder / f"images-{like.channels}-{min(len(like.classes), MOST_CLASSES)}"
            write_random_images(data, like)
        return shrunk(config, str(data), self._folder, sources)

    def _train(self, config: RunConfig) -> int:
        """The images at which it was resumed; a run that several recipes build on is trained once."""
        if config.run_dir not in self._trained:
            try:
                self._trained[config.run_dir] = self._trained_and_resumed(config)
            except UserError as error:
                self._trained[config.run_dir] = error
        outcome = self._trained[config.run_dir]
        if isinstance(outcome, UserError):
            raise outcome
        return outcome

    def _trained_and_resumed(self, config: RunConfig) -> int:
        """Train to the middle and stop as at a signal, then go on to the end."""
        with step(f"training {config.name}, shrunk, to the middle"):
            config = pinned(config)
            with StopRequest() as stop, Trainer(config, self._world, stop) as trainer:
                start = _with_open_gates(trainer)
                while trainer.images + config.batch.global_size < config.budget_images // 2:
                    trainer.step()
                stop.received = "half of the budget"
                code = trainer.run()
            if code != EXIT_STOPPED:
                raise UserError(f"it ended with exit code {code} and not with {EXIT_STOPPED}")
        with step(f"resuming {config.name}, shrunk"):
            with StopRequest() as stop, Trainer(config, self._world, stop) as trainer:
                resumed_at = trainer.images
                if resumed_at != config.budget_images // 2:
                    raise UserError(f"it went on from {resumed_at} images, not from {config.budget_images // 2}")
                if trainer.run() or trainer.record.skipped:
                    raise UserError(f"{trainer.record.skipped} of its steps were skipped")
                held = held_parameters(trainer.student.module)
                still = [name for name, weights in _masters(trainer).items() if torch.equal(weights, start[name])]
            if still := [name for name in still if name not in held and _must_move(name, config)]:
                raise UserError(f"{len(still)} of {len(start)} parameters have not moved, {still[0]} for one")
        return resumed_at


def _with_open_gates(trainer: Trainer) -> dict[str, Tensor]:
    """The weights that training starts from: shaken, since what lies behind a zero gate would not move in a few steps.

    Tangents are verified on them too, where those of a fresh network are zero.
    """
    generator = torch.Generator().manual_seed(0)
    shards = trainer.student.shards
    with shards.rewriting():
        for shard in shards:
            shard.set(MASTER, shard.master + 0.05 * torch.randn(shard.master.shape, generator=generator))
    return _masters(trainer)


def _masters(trainer: Trainer) -> dict[str, Tensor]:
    return {shard.name: shard.master.clone() for shard in trainer.student.shards}


def _must_move(name: str, config: RunConfig) -> bool:
    """The weighting head learns only where the loss has one."""
    method = config.objective
    learned = isinstance(method, SimplifiedConsistency) or (isinstance(method, Diffusion) and method.learned_weighting)
    return learned or not name.startswith("weighting.")
