"""What runs have to show: their newest scores averaged over seeds, and the flat figures of a report."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from sctrain.config.schema import RunConfig
from sctrain.errors import UserError
from sctrain.evaluation.method import ODE_SOLVERS, Method
from sctrain.evaluation.publishing import PICTURES, SCALARS
from sctrain.evaluation.reference import FIGURES
from sctrain.evaluation.scoring import REAL
from sctrain.reporting.scalars import read_stats
from sctrain.runs import RunFolder, image_count_name
from sctrain.snapshots import snapshot_config

TITLES = {"teacher": "Teacher", "scd": "sCD", "sct": "sCT"}


@dataclass(frozen=True)
class Figure:
    """Mean over sampling seeds, and largest minus smallest."""

    mean: float
    spread: float
    seeds: int

    @staticmethod
    def of(values: Sequence[float]) -> "Figure":
        return Figure(fmean(values), max(values) - min(values), len(values))


@dataclass(frozen=True)
class Score:
    """One run drawn from in one way. `suffix` ends the names of its figures, e.g. fd_scd_1step."""

    role: str
    suffix: str
    method: Method
    ema: float
    nfe: int
    figures: dict[str, Figure]  # by the names of SCALARS, where they apply

    @property
    def title(self) -> str:
        name = TITLES.get(self.role, self.role)
        return f"{name}, {self.method.title}"


@dataclass(frozen=True)
class Result:
    """A run folder as a reader sees it; every part may still be missing."""

    role: str
    run: RunFolder

    @staticmethod
    def of(role: str, folder: Path) -> "Result":
        if not folder.is_dir():
            raise UserError(f"{folder} is not a run folder; give the run_dir of the {role}'s training run")
        return Result(role, RunFolder(folder))

    @cached_property
    def status(self) -> dict[str, Any]:
        return json.loads(self.run.status.read_text()) if self.run.status.is_file() else {}

    @cached_property
    def stats(self) -> list[dict[str, Any]]:
        return read_stats(self.run.stats) if self.run.stats.is_file() else []

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """All scores, oldest snapshot first."""
        return self.run.scores()

    @property
    def images(self) -> int | None:
        """The newest snapshot that was scored."""
        return self.lines[-1]["images"] if self.lines else None

    @cached_property
    def config(self) -> RunConfig | None:
        return None if self.images is None else snapshot_config(self.run.root, self.images)

    @cached_property
    def scores(self) -> list[Score]:
        """Of the newest snapshot; a teacher has one, its better solver."""
        return [] if self.images is None else self.scores_at(self.images)

    def scores_at(self, images: int) -> list[Score]:
        lines = [line for line in self.lines if line["images"] == images]
        ema = min({line["ema"] for line in lines}, key=lambda ema: fmean(_values(lines, "fd", ema=ema)))
        methods = dict.fromkeys(Method(line["sampler"], line["steps"]) for line in lines)
        scores = [_score(self.role, method, ema, lines) for method in methods]
        if scores[0].method.sampler in ODE_SOLVERS:
            return [min(scores, key=lambda score: score.figures["fd"].mean)]
        return scores

    @cached_property
    def pictures(self) -> dict[str, Tensor]:
        """uint8 (N, C, H, W) of the newest snapshot, by sampler; one class per column."""
        return {} if self.images is None else load_file(self._evaluation(self.images) / PICTURES)

    @property
    def real(self) -> Tensor | None:
        return self.pictures.get(REAL)

    @property
    def reference(self) -> dict[str, Any]:
        """Figures of real images."""
        path = self.run.evaluations / FIGURES
        return json.loads(path.read_text()) if path.is_file() else {}

    def _evaluation(self, images: int) -> Path:
        return self.run.evaluations / image_count_name(images)


def _values(lines: list[dict[str, Any]], name: str, **where: Any) -> list[float]:
    chosen = [line for line in lines if all(line[key] == value for key, value in where.items())]
    return [line[name] for line in chosen if line[name] is not None]


def _score(role: str, method: Method, ema: float, lines: list[dict[str, Any]]) -> Score:
    where = {"ema": ema, "sampler": method.sampler, "steps": method.steps}
    found = {name: _values(lines, name, **where) for name in SCALARS}
    figures = {name: Figure.of(values) for name, values in found.items() if values}
    suffix = role if method.sampler in ODE_SOLVERS else f"{role}_{method.steps}step"
    return Score(role, suffix, method, ema, int(_values(lines, "nfe", **where)[0]), figures)


def flat_figures(results: Sequence[Result]) -> dict[str, float]:
    """Everything by flat names; `*_spread` where there are several seeds. What was not measured is absent."""
    figures: dict[str, float] = {}
    for result in results:
        figures |= {name: value for name, value in result.reference.items() if isinstance(value, float)}
        figures |= _run_figures(result)
        for score in result.scores:
            for name, figure in score.figures.items():
                figures[f"{name}_{score.suffix}"] = figure.mean
                if figure.seeds > 1:
                    figures[f"{name}_{score.suffix}_spread"] = figure.spread
    seconds = [result.status["wall_seconds"] for result in results if result.status]
    if seconds:
        figures["wall_minutes"] = sum(seconds) / 60
    return figures


def _run_figures(result: Result) -> dict[str, float]:
    figures: dict[str, float] = {}
    if result.status.get("wall_seconds"):
        figures[f"images_per_second_{result.role}"] = result.status["images"] / result.status["wall_seconds"]
    if result.scores:
        figures[f"snapshot_images_{result.role}"] = result.lines[-1]["images"]
        figures[f"ema_{result.role}"] = result.scores[0].ema
    return figures
