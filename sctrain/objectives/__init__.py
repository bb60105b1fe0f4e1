"""Objectives by name: what the configuration says, as pure tensor mathematics."""

from collections.abc import Callable
from typing import Any

from sctrain.config import objectives as config
from sctrain.objectives.base import Objective
from sctrain.objectives.continuous import ContinuousConsistency
from sctrain.objectives.diffusion import Diffusion
from sctrain.objectives.discrete import DiscreteConsistency, EdmWeight, even, inverse_gap
from sctrain.objectives.drawing import Data
from sctrain.objectives.early import EarlyContinuous
from sctrain.objectives.levels import DdimPairs, FromData, Grid, LognormalPairs, MappedPairs, UniformPairs, ct_decay
from sctrain.objectives.metrics import Images, build_metric
from sctrain.objectives.progressive import ProgressiveDistillation
from sctrain.objectives.scores import ScoreDistillation
from sctrain.objectives.trajectory import ConsistencyTrajectory
from sctrain.objectives.twins import DiscreteTwin
from sctrain.processes import T_MAX, ModelSpace, sigma_at


def build_objective(
    method: config.Method, data: Data, image_shape: tuple[int, ...], space: ModelSpace | None = None
) -> Objective:
    """The objective that a configuration names, for images (C, H, W) brought to model space by `space`.

    Without one they are in [-1, 1] times 2 sigma_data. UserError where a part of it (a file, a package) is missing.
    """
    space = space or ModelSpace((0.5,), (0.25,), data.sigma_data)
    return _BUILDERS[type(method)](method, data, Images(image_shape, space))


def _diffusion(method: config.Diffusion, data: Data, _: Images) -> Objective:
    return Diffusion(
        **_with_times(method, data), learned_weighting=method.learned_weighting, augmentation=method.augmentation
    )


def _progressive(method: config.ProgressiveDistillation, data: Data, _: Images) -> Objective:
    steps = (method.first_steps, method.last_steps)
    return ProgressiveDistillation(data.sigma_data, data.num_classes, method.label_dropout, *steps, method.weighting)


def _cd(method: config.ConsistencyDistillation, data: Data, images: Images) -> Objective:
    pairs, keep = UniformPairs(Grid.of(method), method.levels), method.target_decay
    return _discrete(
        method, data, images, pairs, neighbour=method.solver, weight=even, keep=(lambda _: keep) if keep else None
    )


def _ct(method: config.ConsistencyTraining, data: Data, images: Images) -> Objective:
    pairs = UniformPairs(Grid.of(method), method.first_levels, method.last_levels)

    def keep(done: float) -> float:
        return ct_decay(pairs.count(done), method.first_levels, method.first_decay)

    return _discrete(
        method, data, images, pairs, neighbour="noise", weight=even, keep=keep if method.first_decay else None
    )


def _ict(method: config.ImprovedTraining, data: Data, images: Images) -> Objective:
    times = (method.times.mean, method.times.std)
    pairs = LognormalPairs(Grid.of(method), method.first_levels, method.last_levels, *times)
    return _discrete(method, data, images, pairs, neighbour="noise", weight=inverse_gap)


def _ect(method: config.EasyTuning, data: Data, images: Images) -> Objective:
    times, sigma_max = (method.times.mean, method.times.std), sigma_at(T_MAX, data.sigma_data)
    pairs = MappedPairs(*times, method.stages, method.q, method.k, method.b, sigma_max)
    weight = inverse_gap if method.weighting == "inverse_gap" else EdmWeight(data.sigma_data)
    return _discrete(method, data, images, pairs, neighbour="noise", weight=weight)


def _lcm(method: config.LatentConsistency, data: Data, images: Images) -> Objective:
    keep, guidance = method.target_decay, (method.guidance.low, method.guidance.high)
    return _discrete(
        method,
        data,
        images,
        DdimPairs(data.sigma_data, method.ddim_steps),
        neighbour="euler" if method.distils else "noise",
        weight=even,
        keep=(lambda _: keep) if keep else None,
        guidance=guidance,
    )


def _continuous(method: config.ContinuousObjective, data: Data, _: Images) -> Objective:
    parts = _simplified(method, data)
    if method.vsd is None:
        return ContinuousConsistency(**parts, segments=method.segments)
    times, fake_times = ((each.mean, each.std) for each in (method.vsd.times, method.vsd.fake_times))
    return ScoreDistillation(**parts, factor=method.vsd.factor, compared_at=times, learnt_at=fake_times)


def _twin(method: config.DiscreteTwin, data: Data, _: Images) -> Objective:
    return DiscreteTwin(**_simplified(method, data), grid=FromData.of(method), levels=method.levels)


def _early(method: config.EarlyContinuous, data: Data, _: Images) -> Objective:
    return EarlyContinuous(
        data.sigma_data,
        data.num_classes,
        method.label_dropout,
        distill=method.distils,
        grid=Grid.of(method),
        full=method.form == "full",
    )


def _trajectory(method: config.TrajectoryObjective, data: Data, images: Images) -> Objective:
    return ConsistencyTrajectory(
        data.sigma_data,
        data.num_classes,
        method.label_dropout,
        FromData.of(method),
        levels=method.levels,
        most_steps=method.teacher_steps or method.levels,
        matching=method.matching,
        jump_by=method.jump_by,
        metric=build_metric(method.metric, images),
        keep=method.target_decay,
        denoising=method.denoising,
        time_mean=method.times.mean,
        time_std=method.times.std,
        adversary_after=method.adversary and method.adversary.after,
    )


def _discrete(method: Any, data: Data, images: Images, pairs: Any, **parts: Any) -> DiscreteConsistency:
    metric = build_metric(method.metric, images)
    return DiscreteConsistency(
        data.sigma_data, data.num_classes, method.label_dropout, pairs=pairs, metric=metric, **parts
    )


def _simplified(method: config.ContinuousObjective | config.DiscreteTwin, data: Data) -> dict[str, Any]:
    tangents = ("tangent_normalization", "tangent_constant", "tangent_warmup_images")
    return {
        **_with_times(method, data),
        **{name: getattr(method, name) for name in tangents},
        "distill": method.distils,
        "guidance": method.guidance and (method.guidance.low, method.guidance.high),
    }


def _with_times(method: Any, data: Data) -> dict[str, Any]:
    return {
        "sigma_data": data.sigma_data,
        "num_classes": data.num_classes,
        "time_mean": method.times.mean,
        "time_std": method.times.std,
        "label_dropout": method.label_dropout,
    }


_BUILDERS: dict[type[config.Method], Callable[[Any, Data, Images], Objective]] = {
    config.TrigFlowObjective: _diffusion,
    config.EdmObjective: _diffusion,
    config.ProgressiveDistillation: _progressive,
    config.ConsistencyDistillation: _cd,
    config.ConsistencyTraining: _ct,
    config.ImprovedTraining: _ict,
    config.EasyTuning: _ect,
    config.LatentConsistency: _lcm,
    config.ContinuousObjective: _continuous,
    config.TrajectoryObjective: _trajectory,
    config.DiscreteTwin: _twin,
    config.EarlyContinuous: _early,
}
