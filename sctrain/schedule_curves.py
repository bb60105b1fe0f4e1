"""What a run description lets change over a run, and which noise levels it draws, as panels of curves.

Counts of levels, grids, shares of their cells, decays, mappings, warm-up and learning rate come from the functions that
training uses. Densities of times that it draws without a grid, and the EMA's profiles, are written out here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from sctrain.config import objectives as methods
from sctrain.config.schema import RunConfig
from sctrain.objectives.base import Progress
from sctrain.objectives.continuous import warmup
from sctrain.objectives.levels import (
    FromData,
    Grid,
    ct_decay,
    ct_levels,
    ddim_times,
    ect_mapping,
    ect_stage,
    ict_levels,
    lognormal_cells,
)
from sctrain.objectives.progressive import steps_at
from sctrain.objectives.trajectory import UPPER_PART
from sctrain.power_ema import gamma_from_width
from sctrain.processes import T_MAX
from sctrain.reporting.panels import Curve, Panel, SecondScale
from sctrain.schedules import learning_rate

IMAGES = "images seen"
ANGLES = (0.01, 0.1, 0.5, 1.1, 1.5)  # ticks, rad
FEWEST = 1e-4  # part of the budget: where logarithmic axes of images begin


def schedule_panels(config: RunConfig) -> list[Panel]:
    """Those that its method has, in reading order; learning rate and EMA always."""
    candidates = (_levels, _target_decay, _noise_levels, _mapping, _warmup, _learning_rate, _ema)
    return [panel for panel in (candidate(config) for candidate in candidates) if panel is not None]


def _done() -> np.ndarray:
    """Parts of the budget, dense where ramps and first stages are."""
    return np.unique(np.concatenate([np.linspace(0, 1, 4001), np.geomspace(1e-6, 1, 500)]))


def _over_images(config: RunConfig, values: list[float], *, held: bool = False) -> Curve:
    return Curve(_done() * config.budget_images, values, held=held)  # pyright: ignore[reportArgumentType]


def level_count(config: RunConfig, done: float) -> int | None:
    """N after a part of the budget; None for methods on no changing grid."""
    match config.objective:
        case methods.ConsistencyTraining(first_levels=first, last_levels=last):
            return ct_levels(done, first, last)
        case methods.ImprovedTraining(first_levels=first, last_levels=last):
            return ict_levels(done, first, last)
        case methods.ProgressiveDistillation() as method:
            progress = Progress(round(done * config.budget_images), config.budget_images)
            return steps_at(progress, method.first_steps, method.last_steps)
    return None


def _levels(config: RunConfig) -> Panel | None:
    if level_count(config, 0.0) is None:
        return None
    steps = config.objective.name == "pd"
    counts = [float(level_count(config, done) or 0) for done in _done()]
    title = "Steps of the student, N(k)" if steps else "Noise levels, N(k)"
    scale = "linear" if config.objective.name == "ct" else "log"
    return Panel(title, IMAGES, "N", [_over_images(config, counts, held=True)], ("linear", scale), counts=True)


def _target_decay(config: RunConfig) -> Panel | None:
    method = config.objective
    if isinstance(method, methods.ConsistencyTraining) and method.has_target:
        counts = (level_count(config, done) or 0 for done in _done())
        values = [ct_decay(count, method.first_levels, method.first_decay) for count in counts]
    elif getattr(method, "target_decay", 0.0) > 0:
        values = [method.target_decay] * len(_done())
    else:
        return None
    label = "1 - μ" if min(values) < max(values) else f"1 - μ, μ = {values[0]:g}"
    curve = _over_images(config, [1 - value for value in values])
    return Panel("Decay of the target network, μ(k)", IMAGES, label, [curve], ("linear", "log"), counts=True)


def _noise_levels(config: RunConfig) -> Panel:
    """Probability per unit of ln sigma, so that grids of any N and continuous times can be compared."""
    curves, sigma_data = list(_densities(config)), config.sigma_data
    angle = SecondScale(
        "t = arctan(σ / sigma_data), rad",
        lambda sigma: np.arctan(np.maximum(sigma, 0) / sigma_data),
        lambda t: sigma_data * np.tan(np.clip(t, 0, 1.5707)),
        ANGLES,
    )
    title, label = "Noise levels drawn, p(σ)", "probability per unit of ln σ"
    legend = "best" if len(curves) > 1 else "upper left"
    scales = ("log", "linear")
    return Panel(title, "σ", label, curves, scales, second=angle, ordered=True, legend=legend)


def _densities(config: RunConfig) -> Iterator[Curve]:
    method = config.objective
    match method:
        case methods.ConsistencyTraining() | methods.ImprovedTraining():
            early = 0.01 if method.name == "ct" else 0.5  # between the first and the last N
            for count in sorted({level_count(config, done) or 0 for done in (0.0, early, 1.0)}):
                yield _cells(Grid.of(method).levels(count), getattr(method, "times", None), f"N = {count}")
        case methods.ConsistencyDistillation():
            yield _cells(Grid.of(method).levels(method.levels), None, f"N = {method.levels}")
        case methods.DiscreteTwin():
            yield _cells(FromData.of(method).levels(method.levels + 1), method.times, f"N = {method.levels}")
        case methods.TrajectoryObjective():
            yield _starts(method)
            if method.denoising:
                yield _denoising(method)
        case methods.LatentConsistency():
            sigmas, steps = config.sigma_data * ddim_times(method.ddim_steps)[1:].tan(), method.ddim_steps
            yield _at_levels(sigmas, torch.full_like(sigmas, 1 / steps), f"{steps} DDIM steps")
        case methods.ProgressiveDistillation():
            t = np.linspace(0.002, T_MAX, 500)  # dt / d ln sigma = sin t cos t
            yield Curve(config.sigma_data * np.tan(t), np.sin(t) * np.cos(t) / T_MAX, "even in t")  # pyright: ignore[reportArgumentType]
        case methods.EarlyContinuous():
            yield _cells(Grid.of(method).levels(400), None, "even on rho's grid")
        case _:
            mean, std = method.times.mean, method.times.std
            x = np.linspace(mean - 3.5 * std, mean + 3.5 * std, 400)
            density = np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
            yield Curve(np.exp(x), density, f"ln σ ~ N({mean:g}, {std:g}²)")  # pyright: ignore[reportArgumentType]


def _cells(sigmas: Tensor, times: methods.TimeDistribution | None, label: str) -> Curve:
    """The probability of each cell of a grid over its width; without `times` all are drawn evenly."""
    cells = len(sigmas) - 1
    even = torch.full((cells,), 1 / cells, dtype=torch.float64)
    return _per_width(sigmas, even if times is None else lognormal_cells(sigmas, times.mean, times.std), label)


def _per_width(edges: Tensor, shares: Tensor, label: str) -> Curve:
    """Probabilities (N,) over the widths in ln sigma between N + 1 edges; a cell that begins at 0 has none to show."""
    first = int(edges[0] == 0)
    edges, shares = edges[first:], shares[first:]
    return Curve(edges.tolist(), (shares / edges.log().diff()).tolist(), label, held=True)


def start_shares(levels: int, most_steps: int) -> Tensor:
    """How often a jump of CTM starts at each of sigma_1 .. sigma_N: (N,).

    The teacher makes h steps, h ~ U{1 .. most_steps}, and the start leaves room for them: i ~ U{h .. N}.
    """
    index, steps = torch.arange(1, levels + 1), torch.arange(1, most_steps + 1)[:, None]
    return ((index >= steps) / (levels + 1.0 - steps).double()).mean(dim=0)


def _starts(method: methods.TrajectoryObjective) -> Curve:
    """Of the matching term."""
    sigmas = FromData.of(method).levels(method.levels + 1)[1:]  # no jump starts at 0
    most_steps = 1 if method.matching == "local" else method.teacher_steps or method.levels
    return _at_levels(sigmas, start_shares(method.levels, most_steps), f"matching, N = {method.levels}")


def _at_levels(sigmas: Tensor, shares: Tensor, label: str) -> Curve:
    """Each level's probability over the width up to halfway to its neighbours, in ln sigma."""
    inner = (sigmas[:-1] * sigmas[1:]).sqrt()
    edges = torch.cat([sigmas[:1] ** 2 / inner[:1], inner, sigmas[-1:] ** 2 / inner[-1:]])
    return _per_width(edges, shares, label)


def _denoising(method: methods.TrajectoryObjective) -> Curve:
    """Half lognormal, half even on rho's grid from its top down to a part of it."""
    mean, std = method.times.mean, method.times.std
    top = max(mean + 3.5 * std, math.log(method.sigma_max))
    edges = torch.linspace(mean - 3.5 * std, top, 401, dtype=torch.float64).exp()
    way = torch.linspace(1 - UPPER_PART, 1, 2001, dtype=torch.float64)
    below = np.interp(edges, Grid.of(method).at(way), np.linspace(0, 1, len(way)))  # the upper half's share below
    shares = (lognormal_cells(edges, mean, std) + torch.from_numpy(below).diff()) / 2
    return _per_width(edges, shares, "denoising")


def _mapping(config: RunConfig) -> Panel | None:
    method = config.objective
    if not isinstance(method, methods.EasyTuning):
        return None
    sigma = torch.logspace(-4, 2, 481, dtype=torch.float64)
    stages = sorted({ect_stage(done, method.stages) for done in np.linspace(0, 1, 1000)})
    curves = [
        Curve(
            sigma.tolist(), (ect_mapping(sigma, stage, method.q, method.k, method.b) / sigma).tolist(), f"a = {stage}"
        )
        for stage in stages
    ]
    legend = "lower left" if len(curves) > 1 else "best"
    scales = ("log", "linear")
    return Panel("Mapping r(t) by stage a", "t, as σ", "r(t) / t", curves, scales, ordered=True, legend=legend)


def _warmup(config: RunConfig) -> Panel | None:
    images = getattr(config.objective, "tangent_warmup_images", 0)
    if not images:
        return None
    r = [warmup(round(done * config.budget_images), images) for done in _done()]
    return Panel("Warm-up of the tangent", IMAGES, "r", [_over_images(config, r)], counts=True)


def _learning_rate(config: RunConfig) -> Panel:
    budget = config.budget_images
    rates = [learning_rate(config.optimizer, round(done * budget), budget) for done in _done()]
    return Panel(
        "Learning rate", IMAGES, f"rate of {config.optimizer.name}", [_over_images(config, rates)], counts=True
    )


def _ema(config: RunConfig) -> Panel:
    """(tau / t)^gamma at the end of the budget, over t - tau."""
    age = np.geomspace(FEWEST, 1, 400)
    curves = [
        Curve(age * config.budget_images, (1 - age) ** gamma_from_width(width), f"width {width:g}")  # pyright: ignore[reportArgumentType]
        for width in config.ema.widths
    ]
    title, label = "EMA profiles at the end of the run", "weight, relative to the newest"
    return Panel(title, "age of the weights, images", label, curves, ("log", "linear"), counts=True)
