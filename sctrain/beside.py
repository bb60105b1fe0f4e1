"""What is trained in the same run beside the student, on losses of its own: a discriminator, or a score."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.description import DatasetDescription
from models.discriminator import Discriminator
from sctrain import building
from sctrain.blueprint import Blueprint
from sctrain.config.deepspeed import deepspeed_config
from sctrain.config.objectives import ContinuousObjective, TrajectoryObjective
from sctrain.config.schema import OptimizerConfig, RunConfig
from sctrain.zero.engine import StudentEngine
from sctrain.zero.memory import Memories
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
    lay_out: Callable[[Blueprint, dict[str, Any]], nn.Module],
    memories: Memories,
) -> Beside | None:
    """What the method asks for; None where it is the student alone. `lay_out` makes a network that is to be trained."""
    method = config.objective
    if isinstance(method, TrajectoryObjective) and method.adversary is not None:
        return _discriminator(config, method.adversary.width, method.adversary.learning_rate, data, world)
    if not isinstance(method, ContinuousObjective) or method.vsd is None:
        return None
    blueprint, first = building.score_network(config, data)
    zero = deepspeed_config(config, world.size, gpu=world.device.type == "cuda")
    network = lay_out(blueprint, zero)
    engine = StudentEngine(network, config.optimizer, zero, memories.optimizer)
    engine.shards.fill(first)
    weight_norm, factor = ForcedWeightNorm(engine.shards, network), method.vsd.rate_factor
    weight_norm.apply()
    return Beside(engine, lambda rate: factor * rate, weight_norm)


def _discriminator(config: RunConfig, width: int, rate: float, data: DatasetDescription, world: World) -> Beside:
    """It is small: every rank holds it whole."""
    torch.manual_seed(config.seed)
    network = Discriminator(width, data.channels, data.height, data.width, len(data.classes))
    zero = deepspeed_config(config, world.size)
    zero |= {"zero_optimization": {"stage": 0}, "gradient_clipping": 0.0}
    engine = StudentEngine(network, OptimizerConfig(learning_rate=rate, betas=(0.0, 0.99)), zero)
    return Beside(engine, lambda _: rate, None)
