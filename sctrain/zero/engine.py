"""Engines: the student with its optimizer, and frozen networks (teachers). ZeRO-3 partitions them, ZeRO-0 copies."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sctrain.blueprint import Values
from sctrain.config.schema import OptimizerConfig
from sctrain.zero.construction import frozen, partitioned, stage
from sctrain.zero.internals import Zero3, carry_tangents, compute_shard, release_shards, sharing_masters, whole_shape
from sctrain.zero.memory import Memory
from sctrain.zero.pieces import interval
from sctrain.zero.shards import PartitionedShards, ReplicatedShards, Shards

_OPTIMIZERS = {"adam": torch.optim.Adam, "radam": torch.optim.RAdam}


@dataclass(frozen=True)
class StepResult:
    """Whether the weights moved, and the global norm of the gradient before clipping (nan where it was not finite)."""

    applied: bool
    grad_norm: float


class StudentEngine:
    """A network whose gradients are averaged over all ranks; ZeRO-3 partitions all there is of it."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerConfig,
        config: dict[str, Any],
        memory: Memory | None = None,
    ):
        """`memory` is where the optimizer's state lives; other than the device's it takes ZeRO-3."""
        make = _OPTIMIZERS[optimizer.name]
        inner = make(network.parameters(), lr=optimizer.learning_rate, betas=optimizer.betas, eps=optimizer.eps)
        # DeepSpeed replaces the optimizer's parameters by fp32 masters, unless they are that already.
        with sharing_masters():
            self._engine, *_ = deepspeed.initialize(model=network, optimizer=inner, config=copy.deepcopy(config))
        self.module, self._optimizer, self._config = network, inner, config
        self._zero3, self._memory = Zero3(network) if stage(config) == 3 else None, memory or Memory()
        if self._zero3 is not None:
            carry_tangents(network)
            self._zero3.move(self._memory.hold)
            self.shards: Shards = PartitionedShards(network, self._zero3)
        else:
            inner.state.clear()  # DeepSpeed may have taken a step of zero gradient, which would count
            self.shards = ReplicatedShards(network, inner)
        self._accept: Callable[[float], bool] = lambda norm: True
        self._verdict: bool | None = True  # None while a step is to be judged
        self._norm, self._step_optimizer = math.nan, inner.step
        inner.step = self._step_if_accepted

    def __call__(self, *inputs: Tensor | None) -> Any:
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of the mean loss of one micro-batch."""
        self._engine.backward(loss)

    def step(self, learning_rate: float, accept: Callable[[float], bool] = lambda norm: True) -> StepResult | None:
        """To be called after every micro-batch: None while accumulating, else the result of the optimizer step.

        The step is dropped, on all ranks, if the gradient's norm is not finite or `accept(norm)` says so.
        """
        boundary = self._engine.is_gradient_accumulation_boundary()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._verdict, self._accept, self._norm = None, accept, math.nan
        if boundary and self._zero3 is None:
            gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(gradients).item()
        self._engine.step()
        applied, self._verdict = bool(self._verdict), True
        return StepResult(applied, self._norm) if boundary else None

    @contextmanager
    def in_float32(
        self, make_network: Callable[[dict[str, Any]], nn.Module], device: torch.device
    ) -> Iterator[ExactNetwork]:
        """The network on its float32 masters: itself if it has no other weights, else a sharded copy for the while.

        `make_network` makes one of the same shape for the given configuration; its weights do not matter. All ranks
        take part.
        """
        if not self._config["bf16"]["enabled"]:
            yield ExactNetwork(self, self.module)
            return
        config = partitioned(self._config) | {"bf16": {"enabled": False}}
        with torch.random.fork_rng():  # initial weights may be drawn, and dropout masks must not notice
            network = make_network(config)
            copied = FrozenEngine(network, config, device)
        self.shards.copy_to(network, {shard.name: shard.master for shard in self.shards})
        network.train()
        try:
            yield ExactNetwork(copied, network)
        finally:
            copied.release()

    def _step_if_accepted(self, *arguments: Any) -> None:
        """In place of the optimizer's own step, which DeepSpeed calls once, or in ZeRO-3 once per group of shards."""
        if self._verdict is None:
            self._norm = self._norm if self._zero3 is None else self._zero3.gradient_norm
            self._verdict = math.isfinite(self._norm) and self._accept(self._norm)
        if self._verdict:
            self._step_optimizer(*arguments)
            self._put_away()

    def _put_away(self) -> None:
        """Have in its memory what the optimizer stepped just now; its first step makes the moments elsewhere."""
        for group in self._optimizer.param_groups:
            for stepped in group["params"]:
                state = self._optimizer.state[stepped]
                moments = {key: values for key, values in state.items() if values.shape == stepped.shape}
                state.update({key: self._memory.hold(values) for key, values in moments.items()})
                self._memory.relieve(stepped.nbytes * (1 + len(moments)))


class ExactNetwork(NamedTuple):
    """A network in float32 that may be evaluated on all ranks together, and its module."""

    network: Callable[..., Any]
    module: nn.Module


class FrozenEngine:
    """A network that is only evaluated, a teacher or a target: its weights take no gradients, its inputs may.

    In stage 3 its module is called past DeepSpeed's engine, which has no optimizer and so refuses to be differentiated.
    """

    def __init__(self, network: nn.Module, config: dict[str, Any], device: torch.device):
        network.requires_grad_(False).eval()
        if stage(config) == 3:
            self._engine, *_ = deepspeed.initialize(model=network, config=copy.deepcopy(frozen(config)))
            carry_tangents(network)
            self._network = network
        else:
            self._engine = None
            self._network = network.to(device, torch.bfloat16 if config["bf16"]["enabled"] else torch.float32)

    def __call__(self, *inputs: Tensor | None) -> Any:
        return self._network(*inputs)

    def fill(self, values: Values) -> None:
        """Set the weights, of which a rank reads no more than its own."""
        for name, parameter in self._network.named_parameters():
            if self._engine is None:
                parameter.data.copy_(values.read(name, 0, parameter.numel()).view(parameter.shape))
                continue
            start, stop = interval(math.prod(whole_shape(parameter)), dist.get_rank(), dist.get_world_size())
            if start < stop:
                compute_shard(parameter).data[: stop - start].copy_(values.read(name, start, stop))

    def release(self) -> None:
        """Give up the weights: the engine may not be called any more."""
        if self._engine is not None:
            release_shards(self._engine)
