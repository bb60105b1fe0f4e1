"""`sctrain bench methods`: every method from the same start, on the same data and budget, scored alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from data_pipeline.loader import ShardedDataset
from models.score import Score
from models.tangent.engines import tangent_engine
from sctrain import building
from sctrain.bench.timing import Step, interleaved
from sctrain.config.loading import load
from sctrain.config.objectives import TrigFlowObjective
from sctrain.config.schema import RunConfig
from sctrain.evaluation.images import in_memory
from sctrain.objectives import build_objective
from sctrain.objectives.base import Batch, Networks, Progress
from sctrain.objectives.drawing import Data
from sctrain.randomness import Purpose, SampleGenerator
from sctrain.trials import Trial

TEACHER = "teacher"
METHODS = (
    *("pd", "cd", "ct", "cd_continuous", "ct_continuous", "ict", "ect", "sct", "scd", "scd_multistep"),
    *("scd_vsd", "sct_discrete", "scd_discrete", "ctm", "lcm", "lcf"),
)
STARTS_FROM = {"lcf": "lcm", "scd_vsd": "scd"}  # all others start from the teacher


def trials(
    methods: Sequence[str], seeds: Sequence[int], recipes: str, out: Path, overrides: Sequence[str], factor: float
) -> list[Trial]:
    """The teacher's run, and every method's under every seed; budgets are the recipes' times `factor`."""
    teacher = Trial(TEACHER, load(f"{recipes}/{TEACHER}.yaml", [*overrides, f"run_dir={out / TEACHER}"]))
    found = [teacher]
    for method in methods:
        for seed in seeds:
            before = f"{STARTS_FROM[method]}-{seed}" if method in STARTS_FROM else teacher.title
            own = [f"seed={seed}", f"name={method}-{seed}", f"run_dir={out / f'{method}-{seed}'}"]
            config = _scaled(load(f"{recipes}/{method}.yaml", [*overrides, *own]), factor)
            start = out / before if method in STARTS_FROM else teacher.config.run_dir
            found.append(Trial(method, _redirected(config, teacher.config.run_dir, start), after=before))
    return found


def _scaled(config: RunConfig, factor: float) -> RunConfig:
    """The run with its budget and the cool-down that belongs to it times `factor`."""
    optimizer = config.optimizer
    cooldown = int(optimizer.cooldown_images * factor)
    return config.model_copy(
        update={
            "budget_images": int(config.budget_images * factor),
            "optimizer": optimizer.model_copy(update={"cooldown_images": cooldown}),
        }
    )


def _redirected(config: RunConfig, teacher: Path, start: Path) -> RunConfig:
    """The run with these runs as its teacher, as its start, and to be compared with, where it has them."""
    changes: dict[str, Any] = {}
    if config.teacher is not None:
        changes["teacher"] = config.teacher.model_copy(update={"run": teacher})
    if config.start_from is not None:
        changes["start_from"] = config.start_from.model_copy(update={"run": start})
    if config.evaluation.ode_teacher is not None:
        ode_teacher = config.evaluation.ode_teacher.model_copy(update={"run": teacher})
        changes["evaluation"] = config.evaluation.model_copy(update={"ode_teacher": ode_teacher})
    return config.model_copy(update=changes)


def cost_ratios(configs: Mapping[str, RunConfig], rounds: int) -> dict[str, float]:
    """Training on one image, forward and backward, in units of diffusion: medians of interleaved rounds."""
    first = next(iter(configs.values()))
    dataset = building.open_split(first)
    images, labels = in_memory(dataset, first.batch.global_size)
    x0 = building.model_space(first, dataset.description).from_pixels(images)
    batch = Batch(x0, labels)
    diffusion = first.model_copy(update={"objective": TrigFlowObjective(), "teacher": None, "start_from": None})
    steps = {method: _step(config, dataset, batch) for method, config in configs.items()}
    _, timed = interleaved(_step(diffusion, dataset, batch), steps, rounds)
    return {method: timing.ratio.median for method, timing in timed.items()} | {TEACHER: 1.0}


def _step(config: RunConfig, dataset: ShardedDataset, batch: Batch) -> Step:
    about = dataset.description
    known, space = Data(config.sigma_data, len(about.classes)), building.model_space(config, about)
    objective = build_objective(config.objective, known, about.shape, space)
    student = building.fresh_network(config, about)
    as_F = building.parameterization(config).of
    teacher = building.fresh_network(config.model_copy(update={"objective": TrigFlowObjective()}), about)
    teacher.requires_grad_(False).eval()
    target = building.fresh_network(config, about).requires_grad_(False) if config.objective.has_target else None
    networks = Networks(as_F(student), tangent_engine("single_pass"), teacher, target and as_F(target))
    trained = nn.ModuleList([student])
    if config.objective.scores is not None:
        trained.append(Score(building.fresh_network(config, about)))
        networks = replace(networks, score=as_F(trained[-1]))
    draws = objective.draw(
        SampleGenerator(0, range(len(batch.x0)), Purpose.TRAINING),
        batch,
        Progress(config.budget_images // 2, config.budget_images),
    )

    def run() -> None:
        trained.zero_grad()
        loss = objective.loss(draws, networks)
        loss.per_sample.mean().backward()
        if loss.beside is not None:
            loss.beside.mean().backward()

    return Step(run)
