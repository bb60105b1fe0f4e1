"""`sctrain bench methods`: every method from the same start, on the same data and budget, scored alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.loader import ShardedDataset
from models.tangent.engines import tangent_engine
from sctrain import building
from sctrain.bench.table import figure, table
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
    *("sct_discrete", "scd_discrete", "ctm", "lcm", "lcf"),
)
STARTS_FROM = {"lcf": "lcm"}  # all others start from the teacher


@dataclass(frozen=True)
class Row:
    """One method, training seed and number of sampling steps. `fd` is a Frechet distance to the test images."""

    method: str
    seed: int
    steps: int
    sampler: str
    nfe: int
    fd: float | None
    ode_distance: float | None  # mean squared, to the teacher's ODE solution of the same noise
    agreement: float | None  # of an independent classifier with the label
    cost_ratio: float | None  # of training on one image, to diffusion


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


def rows(done: Sequence[Trial], costs: Mapping[str, float]) -> list[Row]:
    """What was scored, with the cost of each method."""
    return [
        Row(
            method=trial.group,
            seed=trial.config.seed,
            steps=line["steps"],
            sampler=line["sampler"],
            nfe=line["nfe"],
            fd=line["fd"],
            ode_distance=line["ode_mse"],
            agreement=line["agreement"],
            cost_ratio=costs.get(trial.group),
        )
        for trial in done
        for line in trial.lines()
    ]


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
    objective = build_objective(config.objective, Data(config.sigma_data, len(about.classes)), about.shape)
    student = building.fresh_network(config, about)
    as_F = building.parameterization(config).of
    teacher = building.fresh_network(config.model_copy(update={"objective": TrigFlowObjective()}), about)
    target = building.fresh_network(config, about).requires_grad_(False) if config.objective.has_target else None
    networks = Networks(as_F(student), tangent_engine("single_pass"), _without_graph(teacher), target and as_F(target))
    draws = objective.draw(
        SampleGenerator(0, range(len(batch.x0)), Purpose.TRAINING),
        batch,
        Progress(config.budget_images // 2, config.budget_images),
    )

    def run() -> None:
        student.zero_grad()
        objective.loss(draws, networks).per_sample.mean().backward()

    return Step(run)


def _without_graph(network: nn.Module) -> Any:
    network.requires_grad_(False).eval()

    @torch.no_grad()
    def evaluate(*inputs: Tensor) -> Any:
        return network(*inputs)

    return evaluate


def summary(found: Sequence[Row]) -> str:
    """Means over seeds, and half the distance of the extremes behind them."""
    head = ("method", "steps", "Frechet", "to teacher's ODE", "agreement", "cost / image", "seeds")
    lines = []
    for method, sampler, steps in dict.fromkeys((row.method, row.sampler, row.steps) for row in found):
        mine = [row for row in found if (row.method, row.sampler, row.steps) == (method, sampler, steps)]
        name = method if sampler == "consistency" else f"{method} ({sampler})"
        lines.append(
            (
                name,
                str(steps),
                _spread([row.fd for row in mine], ".2f"),
                _spread([row.ode_distance for row in mine], ".4f"),
                _spread([row.agreement for row in mine], ".3f"),
                figure(mine[0].cost_ratio),
                str(len(mine)),
            )
        )
    return table(head, lines)


def _spread(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    half = (max(known) - min(known)) / 2
    return format(fmean(known), form) + (f" +- {format(half, form)}" if len(known) > 1 else "")


def as_json(found: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in found]
