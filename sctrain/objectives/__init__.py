"""Objectives by name: what the configuration says, as pure tensor mathematics."""

import math
from collections.abc import Callable
from typing import Any

from sctrain.config import objectives as config
from sctrain.objectives.base import Objective
from sctrain.objectives.continuous import ContinuousConsistency
from sctrain.objectives.diffusion import Diffusion
from sctrain.objectives.discrete import DiscreteConsistency, EdmWeight, even, inverse_gap
from sctrain.objectives.drawing import Data
from sctrain.objectives.levels import DdimPairs, Grid, LognormalPairs, MappedPairs, UniformPairs, ct_decay
from sctrain.objectives.metrics import build_metric
from sctrain.objectives.progressive import ProgressiveDistillation
from sctrain.processes import T_MAX


def build_objective(method: config.Method, data: Data, image_shape: tuple[int, ...]) -> Objective:
    """The objective that a configuration names, for images (C, H, W)."""
    return _BUILDERS[type(method)](method, data, image_shape)


def _diffusion(method: config.Diffusion, data: Data, _: tuple[int, ...]) -> Objective:
    return Diffusion(*_with_times(method, data), learned_weighting=method.learned_weighting)


def _progressive(method: config.ProgressiveDistillation, data: Data, _: tuple[int, ...]) -> Objective:
    steps = (method.first_steps, method.last_steps)
    return ProgressiveDistillation(data.sigma_data, data.num_classes, method.label_dropout, *steps, method.weighting)


def _cd(method: config.ConsistencyDistillation, data: Data, shape: tuple[int, ...]) -> Objective:
    pairs, keep = UniformPairs(_grid(method), method.levels), method.target_decay
    return _discrete(
        method, data, shape, pairs, neighbour=method.solver, weight=even, keep=(lambda _: keep) if keep else None
    )


def _ct(method: config.ConsistencyTraining, data: Data, shape: tuple[int, ...]) -> Objective:
    pairs = UniformPairs(_grid(method), method.first_levels, method.last_levels)

    def keep(done: float) -> float:
        return ct_decay(pairs.count(done), method.first_levels, method.first_decay)

    return _discrete(
        method, data, shape, pairs, neighbour="noise", weight=even, keep=keep if method.first_decay else None
    )


def _ict(method: config.ImprovedTraining, data: Data, shape: tuple[int, ...]) -> Objective:
    times = (method.times.mean, method.times.std)
    pairs = LognormalPairs(_grid(method), method.first_levels, method.last_levels, *times)
    return _discrete(method, data, shape, pairs, neighbour="noise", weight=inverse_gap)


def _ect(method: config.EasyTuning, data: Data, shape: tuple[int, ...]) -> Objective:
    times, sigma_max = (method.times.mean, method.times.std), data.sigma_data * math.tan(T_MAX)
    pairs = MappedPairs(*times, method.stages, method.q, method.k, method.b, sigma_max)
    weight = inverse_gap if method.weighting == "inverse_gap" else EdmWeight(data.sigma_data)
    return _discrete(method, data, shape, pairs, neighbour="noise", weight=weight)


def _lcm(method: config.LatentConsistency, data: Data, shape: tuple[int, ...]) -> Objective:
    keep, guidance = method.target_decay, (method.guidance.low, method.guidance.high)
    return _discrete(
        method,
        data,
        shape,
        DdimPairs(data.sigma_data, method.ddim_steps),
        neighbour="euler" if method.name == "lcm" else "noise",
        weight=even,
        keep=(lambda _: keep) if keep else None,
        guidance=guidance,
    )


def _continuous(method: config.ContinuousObjective, data: Data, _: tuple[int, ...]) -> Objective:
    return ContinuousConsistency(
        *_with_times(method, data),
        distill=method.name == "scd",
        tangent_normalization=method.tangent_normalization,
        tangent_constant=method.tangent_constant,
        tangent_warmup_images=method.tangent_warmup_images,
        guidance=method.guidance and (method.guidance.low, method.guidance.high),
    )


def _discrete(method: Any, data: Data, shape: tuple[int, ...], pairs: Any, **parts: Any) -> DiscreteConsistency:
    metric = build_metric(method.metric, shape)
    return DiscreteConsistency(
        data.sigma_data, data.num_classes, method.label_dropout, pairs=pairs, metric=metric, **parts
    )


def _grid(method: config.OnGrid) -> Grid:
    return Grid(method.sigma_min, method.sigma_max, method.rho)


def _with_times(method: Any, data: Data) -> tuple[float, int, float, float, float]:
    return data.sigma_data, data.num_classes, method.times.mean, method.times.std, method.label_dropout


_BUILDERS: dict[type[config.Method], Callable[[Any, Data, tuple[int, ...]], Objective]] = {
    config.TrigFlowObjective: _diffusion,
    config.EdmObjective: _diffusion,
    config.ProgressiveDistillation: _progressive,
    config.ConsistencyDistillation: _cd,
    config.ConsistencyTraining: _ct,
    config.ImprovedTraining: _ict,
    config.EasyTuning: _ect,
    config.LatentConsistency: _lcm,
    config.ContinuousObjective: _continuous,
}
