"""The local fp32 pieces of a ZeRO-3 engine by parameter name: masters and optimizer moments, without padding.

ZeRO-3 keeps each parameter twice: the fp32 master that the optimizer steps, and `ds_tensor`, of the training precision,
that forwards gather; only an optimizer step copies the first to the second. Whoever sets a master here sets both.
DeepSpeed creates the moments at the first optimizer step, so a fresh engine has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from sctrain.zero.pieces import Piece, interval

MASTER = "master"


class Shard:
    """The part [start, stop) of one flattened parameter that this rank holds; `shape` and `numel` are the whole's."""

    def __init__(self, name: str, parameter: nn.Parameter):
        assert parameter.requires_grad, f"{name} is frozen: ZeRO-3 keeps no master of it"
        self.name, self.shape, self.numel = name, tuple(parameter.ds_shape), int(parameter.ds_numel)
        self.start, self.stop = interval(self.numel, dist.get_rank(), dist.get_world_size())
        self._parameter = parameter

    @property
    def master(self) -> Tensor:
        """(stop - start,) fp32 weights; without offload a view of what the optimizer steps."""
        return self._trim(safe_get_local_fp32_param(self._parameter))

    def get(self, kind: str) -> Tensor:
        """(stop - start,) fp32 values: MASTER, or a moment such as exp_avg."""
        if kind == MASTER:
            return self.master
        return self._trim(safe_get_local_optimizer_state(self._parameter, kind))

    def set(self, kind: str, values: Tensor) -> None:
        """Overwrite with (stop - start,) values; a master only inside `Shards.rewriting`."""
        compute_copy = self._parameter.ds_tensor
        padded = values.new_zeros(compute_copy.numel(), dtype=torch.float32)
        padded[: self.stop - self.start] = values
        if kind == MASTER:
            safe_set_local_fp32_param(self._parameter, padded)
            compute_copy.data.copy_(padded)
        else:
            safe_set_local_optimizer_state(self._parameter, padded, kind)

    def piece(self, kind: str) -> Piece:
        return Piece(self.get(kind), self.shape, self.start)

    def _trim(self, padded: Tensor) -> Tensor:
        return padded.flatten()[: self.stop - self.start]


class Shards:
    """All parameters of a ZeRO-3 engine's module, in the module's order."""

    def __init__(self, module: nn.Module):
        self._by_name = {name: Shard(name, parameter) for name, parameter in module.named_parameters()}
        self._zero = next(module.parameters())._z3_optimizer

    def __iter__(self) -> Iterator[Shard]:
        return iter(self._by_name.values())

    def __getitem__(self, name: str) -> Shard:
        return self._by_name[name]

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the optimizer's state tensors of the parameters' shape; empty before its first step."""
        flat = self._zero.fp32_partitioned_groups_flat[0]
        state = self._zero.optimizer.state.get(flat, {})
        return tuple(key for key, value in state.items() if torch.is_tensor(value) and value.shape == flat.shape)

    @property
    def optimizer_step(self) -> int:
        """How many steps the optimizer has taken."""
        steps = {int(state["step"]) for state in self._zero.optimizer.state.values()}
        assert len(steps) <= 1, f"the optimizer's groups have taken different numbers of steps: {steps}"
        return steps.pop() if steps else 0

    @contextmanager
    def rewriting(self) -> Iterator[None]:
        """Masters may be set inside, and every forward after it sees them. All ranks take part.

        The whole copies that ZeRO-3 keeps of small parameters between steps are dropped before and gathered after.
        """
        self._zero.checkpoint_event_prologue()
        yield
        self._zero.checkpoint_event_epilogue()

    def set_optimizer_step(self, step: int) -> None:
        """Let the optimizer have taken `step` steps: 0 forgets its state, more creates moments where there are none."""
        state = self._zero.optimizer.state
        if step == 0:
            state.clear()
        elif not state:
            self._create_moments()
        for values in state.values():
            values["step"] = torch.full_like(values["step"], step) if torch.is_tensor(values["step"]) else step

    def _create_moments(self) -> None:
        """Have the optimizer lay out its own state, by a step that moves nothing: gradients and rate are zero."""
        rates = [group["lr"] for group in self._zero.optimizer.param_groups]
        for group in self._zero.optimizer.param_groups:
            group["lr"] = 0.0
        for index, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
            gradient, flat.grad = flat.grad, torch.zeros_like(flat)
            self._zero._optimizer_step(index)
            flat.grad = gradient
        for group, rate in zip(self._zero.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
