"""Objectives by name: what the configuration says, as pure tensor mathematics."""

from sctrain.config.schema import ContinuousObjective, DiffusionObjective
from sctrain.objectives.base import Objective
from sctrain.objectives.continuous import ContinuousConsistency
from sctrain.objectives.diffusion import TrigFlowDiffusion


def build_objective(config: DiffusionObjective | ContinuousObjective, sigma_data: float, num_classes: int) -> Objective:
    """The objective that a configuration names."""
    shared = dict(
        sigma_data=sigma_data,
        num_classes=num_classes,
        time_mean=config.times.mean,
        time_std=config.times.std,
        label_dropout=config.label_dropout,
    )
    if isinstance(config, DiffusionObjective):
        return TrigFlowDiffusion(**shared)
    return ContinuousConsistency(
        **shared,
        distill=config.name == "scd",
        tangent_normalization=config.tangent_normalization,
        tangent_constant=config.tangent_constant,
        tangent_warmup_images=config.tangent_warmup_images,
    )
