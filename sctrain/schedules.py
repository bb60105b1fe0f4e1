"""Learning rate as a pure function of images seen."""

import math

from sctrain.config.schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, images: int, budget: int) -> float:
    """Ramp x inverse square root after the reference (EDM2 eq. 67) x linear cool-down, at `images` of `budget`."""
    factor = min(1.0, images / config.ramp_images) if config.ramp_images else 1.0
    if config.reference_images:
        factor /= math.sqrt(max(images / config.reference_images, 1.0))
    if config.cooldown_images:  # the last step may end beyond the budget
        factor *= min(1.0, max(0.0, budget - images) / config.cooldown_images)
    return config.learning_rate * factor
