"""Objectives by name: what the configuration says, as pure tensor mathematics."""

from sctrain.config.schema import ContinuousObjective, DiffusionObjective
from sctrain.objectives.base import Objective
from sctrain.objectives.continuous import ContinuousConsistency
from sctrain.objectives.diffusion import TrigFlowDiffusion


def build_objective(config: DiffusionObjective | ContinuousObjective, sigma_data: float, num_classes: int) -> Objective:
    """The objective that a configuration names."""
    common = (sigma_data, num_classes, config.times.mean, config.times.std, config.label_dropout)
    if isinstance(config, DiffusionObjective):
        return TrigFlowDiffusion(*common)
    return ContinuousConsistency(
        *common,
        distill=config.name == "scd",
        tangent_normalization=config.tangent_normalization,
        tangent_constant=config.tangent_constant,
        tangent_warmup_images=config.tangent_warmup_images,
        guidance=config.guidance and (config.guidance.low, config.guidance.high),
    )
