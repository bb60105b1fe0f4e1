"""Quality over network evaluations: a teacher's ODE solvers beside its students."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from data_pipeline.description import read_description
from sctrain.config.schema import RunConfig
from sctrain.errors import UserError
from sctrain.evaluation.distance import Distance
from sctrain.evaluation.generation import Generator
from sctrain.evaluation.method import ODE_SOLVERS, TITLES, Method, ema_width, guidance_scale, samplers, student_methods
from sctrain.snapshots import newest_images, snapshot_config


@dataclass(frozen=True)
class SampleSettings:
    """What is drawn."""

    evaluations: tuple[int, ...] = (10, 20, 50)  # of a diffusion model's network, at most
    steps: tuple[int, ...] = (1, 2, 4)  # of students
    samples: int = 2000
    seed: int = 0
    ema: float | None = None  # None: each run's first to be scored
    guidance: float | None = None  # None: each run's own


@dataclass(frozen=True)
class SampleRow:
    """One way of drawing from one run."""

    run: str
    objective: str
    sampler: str
    steps: int
    nfe: int  # network evaluations per image
    fd: float  # Frechet distance to the training split
    broken: int  # images that are not finite; they are scored as gray
    seconds_per_image: float

    @property
    def title(self) -> str:
        """Of the run and its sampler, without the number of steps."""
        return f"{self.run}, {TITLES[self.sampler]}" if self.sampler in ODE_SOLVERS else self.run


@dataclass(frozen=True)
class Subject:
    """The newest snapshot of a run, and how it is to be drawn from."""

    run: Path
    images: int
    config: RunConfig
    ema: float
    methods: list[Method]

    @staticmethod
    def of(run: Path, settings: SampleSettings) -> Subject:
        """UserError if there is no snapshot, or it has no such average, or does not know the scale of guidance."""
        images = newest_images(run)
        config = snapshot_config(run, images)
        guidance_scale(run, config, settings.guidance)
        ema = ema_width(config, settings.ema)
        return Subject(run, images, config, ema, methods_within(config, images, settings))


def methods_within(config: RunConfig, images: int, settings: SampleSettings) -> list[Method]:
    """A diffusion model's solvers at the most steps within each number of evaluations; a student's numbers of steps."""
    if samplers(config) != ODE_SOLVERS:
        return student_methods(config, settings.steps, images)
    return [
        Method(solver, (most + 1) // 2 if solver == "heun" else most)  # Heun asks 2 steps - 1 times
        for solver in ("euler", "heun", "dpm")
        for most in settings.evaluations
    ]


def subjects(runs: Sequence[Path], settings: SampleSettings) -> list[Subject]:
    """The runs, all of the same data: distances to other data, by another extractor, cannot be compared."""
    found = [Subject.of(run, settings) for run in runs]
    data = [read_description(subject.config.data.url).splits["train"].fingerprint for subject in found]
    for subject, fingerprint in zip(found, data, strict=True):
        if fingerprint != data[0]:
            raise UserError(f"{subject.run} and {found[0].run} were trained on other data; bench them apart")
    return found


def measure(found: Sequence[Subject], settings: SampleSettings, device: torch.device) -> list[SampleRow]:
    """One row per way of drawing, all from the same noise and labels; each is warmed up by one batch, untimed."""
    distance = Distance.of(found[0].config.data.url, device, found[0].config.data.vae)
    rows: list[SampleRow] = []
    for subject in found:
        generator = Generator.of(subject.run, subject.images, subject.ema, device, settings.guidance)
        generator.draw(subject.methods[0], settings.seed, min(settings.samples, subject.config.evaluation.batch))
        rows += [_row(subject, generator, method, settings, distance) for method in subject.methods]
    return rows


def _row(
    subject: Subject, generator: Generator, method: Method, settings: SampleSettings, distance: Distance
) -> SampleRow:
    drawn = generator.draw(method, settings.seed, settings.samples)
    about = (subject.run.name, subject.config.objective.name, method.sampler, method.steps, drawn.nfe)
    return SampleRow(*about, distance(drawn.pixels(generator.space)), drawn.broken, drawn.seconds / settings.samples)


def plot(rows: Sequence[SampleRow], file: Path) -> None:
    """Frechet distance over network evaluations, both logarithmic: solvers dashed, students in full lines."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for title in dict.fromkeys(row.title for row in rows):
        line = [row for row in rows if row.title == title]
        style = "--" if line[0].sampler in ODE_SOLVERS else "-"
        axes.plot([row.nfe for row in line], [row.fd for row in line], style, marker="o", label=title)
    axes.set(xscale="log", yscale="log", xlabel="network evaluations per image", ylabel="Frechet distance")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
