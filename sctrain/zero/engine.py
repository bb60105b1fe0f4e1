"""ZeRO-3 engines: the student with its optimizer, and frozen networks (teachers) as engines without one."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from sctrain.config.schema import OptimizerConfig
from sctrain.zero.hooks import carry_tangents

_OPTIMIZERS = {"adam": torch.optim.Adam, "radam": torch.optim.RAdam}


@dataclass(frozen=True)
class StepResult:
    """Whether the weights moved, and the global norm of the gradient before clipping (nan where it was not finite)."""

    applied: bool
    grad_norm: float


class StudentEngine:
    """A network whose parameters, gradients, moments and fp32 masters are sharded over all ranks."""

    def __init__(self, network: nn.Module, optimizer: OptimizerConfig, config: dict[str, Any]):
        make = _OPTIMIZERS[optimizer.name]
        # ZeRO-3 replaces the parameters of this optimizer by its flat fp32 shards.
        self._optimizer = make(
            network.parameters(), lr=optimizer.learning_rate, betas=optimizer.betas, eps=optimizer.eps
        )
        self._engine, *_ = deepspeed.initialize(model=network, optimizer=self._optimizer, config=copy.deepcopy(config))
        self.module = network  # its parameters are partitioned now
        carry_tangents(network)

    def __call__(self, u: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self._engine(u, t, labels)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of the mean loss of one micro-batch."""
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> StepResult | None:
        """To be called after every micro-batch: None while accumulating, else the result of the optimizer step."""
        boundary = self._engine.is_gradient_accumulation_boundary()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        if not boundary:
            return None
        norm = self._engine.get_global_grad_norm()
        return StepResult(self._engine.was_step_applied(), float("nan") if norm is None else float(norm))


class FrozenEngine:
    """A sharded network that is only evaluated: the teacher of a distillation."""

    def __init__(self, network: nn.Module, config: dict[str, Any]):
        network.requires_grad_(False).eval()
        self._engine, *_ = deepspeed.initialize(model=network, config=copy.deepcopy(config))

    @torch.no_grad()
    def __call__(self, u: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self._engine(u, t, labels)
