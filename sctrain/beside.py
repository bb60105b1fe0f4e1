"""What is trained in the same run beside the student, on losses of its own: a discriminator, or a score."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from data_pipeline.description import DatasetDescription
from models.discriminator import Discriminator
from sctrain import building
from sctrain.blueprint import Blueprint, Values
from sctrain.config.deepspeed import deepspeed_config
from sctrain.config.schema import OptimizerConfig, RunConfig
from sctrain.zero.engine import StudentEngine
from sctrain.zero.shards import Shards
from sctrain.zero.weight_norm import ForcedWeightNorm
from sctrain.zero.world import World


class Beside:
    """A network with an optimizer of its own."""

    def __init__(self, engine: StudentEngine, rate: Callable[[float], float], weight_norm: ForcedWeightNorm | None):
        """`rate` makes its learning rate of the student's."""
        self.engine, self._rate, self._weight_norm = engine, rate, weight_norm
        self._norm, self._skipped = math.nan, 0

    @property
    def shards(self) -> Shards:
        """For checkpoints."""
        return self.engine.shards

    def train(self, losses: Tensor, student_rate: float) -> None:
        """To be called with every micro-batch; a gradient that is not finite moves nothing, and is counted."""
        self.engine.backward(losses.mean())
        result = self.engine.step(self._rate(student_rate))
        if result is None:
            return
        self._norm, self._skipped = result.grad_norm, self._skipped + (not result.applied)
        if result.applied and self._weight_norm is not None:
            self._weight_norm.apply()

    def report(self) -> dict[str, float]:
        """Of its last step, and how many moved nothing since this process started."""
        return {"beside/grad_norm": self._norm, "beside/skipped": float(self._skipped)}


def trained_beside(
    config: RunConfig,
    data: DatasetDescription,
    world: World,
    trained: Callable[[Blueprint, Values], tuple[StudentEngine, ForcedWeightNorm]],
) -> Beside | None:
    """What the method asks for; None where it is the student alone. `trained` makes an engine as the student's."""
    adversary, scores = config.objective.discriminates, config.objective.scores
    if adversary is not None:
        return _discriminator(config, adversary.width, adversary.learning_rate, data, world)
    if scores is None:
        return None
    engine, weight_norm = trained(*building.score_network(config, data))
    return Beside(engine, lambda rate: scores.rate_factor * rate, weight_norm)


def _discriminator(config: RunConfig, width: int, rate: float, data: DatasetDescription, world: World) -> Beside:
    """It is small: every rank holds it whole."""
    torch.manual_seed(config.seed)
    network = Discriminator(width, data.channels, data.height, data.width, len(data.classes))
    zero = deepspeed_config(config, world.size)
    zero |= {"zero_optimization": {"stage": 0}, "gradient_clipping": 0.0}
    engine = StudentEngine(network, OptimizerConfig(learning_rate=rate, betas=(0.0, 0.99)), zero)
    return Beside(engine, lambda _: rate, None)
