"""One snapshot -> its figures and pictures, for every configured EMA width, sampling seed and sampler."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sctrain.building import use_storage
from sctrain.config.schema import RunConfig, WeightsFrom
from sctrain.evaluation.extractor import Extractor, load_extractor
from sctrain.evaluation.generation import Drawn, Generator, labels_of, teacher_solutions
from sctrain.evaluation.images import RealImages, in_memory, open_pictures
from sctrain.evaluation.method import Method, methods, start_time
from sctrain.evaluation.metrics import mean_squared_distance
from sctrain.evaluation.reference import Reference, load_reference
from sctrain.reporting.console import say
from sctrain.reporting.grids import grid_indices

ODE_PAIRS = 1000  # images compared with the teacher's ODE solutions, at most
REAL = "real"  # name of the picture of test images


@dataclass(frozen=True)
class Judge:
    """What every snapshot of a run is scored against."""

    extractor: Extractor
    reference: Reference
    examples: Tensor  # real images in the order of the grids
    evaluations: Path  # the run's folder of evaluations
    num_classes: int

    @staticmethod
    def of(config: RunConfig, evaluations: Path, device: torch.device) -> "Judge":
        use_storage(config)
        url, vae, samples = config.data.url, config.data.vae, config.evaluation.samples
        extractor = load_extractor(url, device)
        reference = load_reference(url, extractor, samples, evaluations, vae)
        test = open_pictures(url, "test", vae)
        return Judge(extractor, reference, _examples(test, samples), evaluations, len(test.description.classes))


@dataclass(frozen=True)
class Evaluation:
    """Lines for metrics.jsonl, and uint8 pictures (N, C, H, W) by name, in the order of `grid_indices`."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, Tensor] = field(default_factory=dict)


def evaluate_snapshot(
    run: Path,
    images: int,
    config: RunConfig,
    judge: Judge,
    device: torch.device,
    teacher: WeightsFrom | None,
    between: Callable[[], None],
) -> Evaluation:
    """Score the snapshot at `images`; `between` is called after each sampler and may raise to give up."""
    evaluation = Evaluation(pictures={REAL: judge.examples})
    for ema in config.evaluation.ema:
        generator = Generator.of(run, images, ema, device)
        for seed in config.evaluation.seeds:
            for method in methods(config, images):
                drawn = generator.draw(method, seed, config.evaluation.samples)
                pixels = _pixels(generator, drawn, images, method)
                chosen = grid_indices(len(pixels), judge.num_classes)
                evaluation.pictures.setdefault(method.name, pixels[chosen])
                figures = _figures(pixels, generator, judge) | _ode_distance(drawn, judge, teacher, seed, generator)
                evaluation.lines.append(_line(images, ema, seed, method, drawn, figures))
                between()
    return evaluation


def _figures(pixels: Tensor, generator: Generator, judge: Judge) -> dict[str, float]:
    labels = labels_of(torch.arange(len(pixels)), judge.num_classes)
    return judge.reference.score(pixels, labels, judge.extractor)


def _ode_distance(
    drawn: Drawn, judge: Judge, teacher: WeightsFrom | None, seed: int, generator: Generator
) -> dict[str, float | None]:
    """Mean squared distance to the teacher's ODE solutions of the same noise, labels and guidance, in model space.

    They start where the student's trajectories do: the same noise at another time is another image.
    """
    if teacher is None:
        return {"ode_mse": None}
    pairs = min(len(drawn.x), ODE_PAIRS)
    at = (generator.device, generator.guidance, start_time(generator.config))
    solutions = teacher_solutions(teacher, seed, pairs, judge.evaluations, *at, generator.config.guide)
    return {"ode_mse": mean_squared_distance(drawn.x[:pairs].nan_to_num(), solutions)}


def _pixels(generator: Generator, drawn: Drawn, images: int, method: Method) -> Tensor:
    if drawn.broken:
        say(f"snapshot {images}: {drawn.broken} images of {method.name} are not finite and are scored as gray")
    return drawn.pixels(generator.space)


def _line(
    images: int, ema: float, seed: int, method: Method, drawn: Drawn, figures: dict[str, float | None]
) -> dict[str, Any]:
    about = {"images": images, "ema": ema, "seed": seed, "sampler": method.sampler, "steps": method.steps}
    return {**about, "nfe": drawn.nfe, "samples": len(drawn.x), **figures, "seconds": round(drawn.seconds, 3)}


def _examples(test: RealImages, samples: int) -> Tensor:
    """Real test images in the places of the generated ones; a class with few of them repeats."""
    images, labels = in_memory(test, 5000)
    num_classes = len(test.description.classes)
    by_class = [images[labels == label] for label in range(num_classes)]
    chosen = grid_indices(samples, num_classes)
    rows = [(by_class[index % num_classes], index // num_classes) for index in chosen]
    return torch.stack([pool[row % len(pool)] if len(pool) else torch.zeros_like(images[0]) for pool, row in rows])
