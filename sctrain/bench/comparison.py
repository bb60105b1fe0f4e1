"""Scores of several trials side by side: a row for each, and a table of means over their seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from sctrain.bench.table import figure, table
from sctrain.trials import Trial


@dataclass(frozen=True)
class Row:
    """A group of trials, training seed and number of sampling steps. `fd`: Frechet distance to the training split."""

    method: str
    seed: int
    steps: int
    sampler: str
    nfe: int
    fd: float | None
    ode_distance: float | None  # mean squared, to the teacher's ODE solution of the same noise
    agreement: float | None  # of an independent classifier with the label
    cost_ratio: float | None  # of training on one image, to diffusion


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
