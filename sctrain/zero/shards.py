"""The local fp32 pieces of a training engine by parameter name: masters and optimizer moments.

A shard is this rank's interval of a flattened parameter, whatever the ZeRO stage: in stage 3 it is all that the rank
has, in stage 0 a view of the whole. EMA and checkpoints know shards only.

Each parameter exists twice: as the fp32 master that the optimizer steps, and in the precision that forwards use; only
an optimizer step copies the first to the second. Whoever sets a master does it inside `rewriting`, which does the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sctrain.blueprint import Values
from sctrain.zero.internals import Zero3, compute_shard, whole_shape
from sctrain.zero.pieces import Piece, interval, row_parts

MASTER = "master"


class Shard(ABC):
    """The part [start, stop) of one flattened parameter that this rank holds; `shape` is the whole's."""

    def __init__(self, name: str, shape: tuple[int, ...]):
        self.name, self.shape, self.numel = name, shape, torch.Size(shape).numel()
        self.start, self.stop = interval(self.numel, dist.get_rank(), dist.get_world_size())

    @property
    def master(self) -> Tensor:
        """(stop - start,) fp32 weights; a view of what the optimizer steps."""
        return self.get(MASTER)

    @abstractmethod
    def get(self, kind: str) -> Tensor:
        """(stop - start,) fp32 values: MASTER, or a moment such as exp_avg."""

    @abstractmethod
    def set(self, kind: str, values: Tensor) -> None:
        """Overwrite with (stop - start,) values, inside `Shards.rewriting`."""

    @abstractmethod
    def scale_rows(self, factors: Tensor) -> None:
        """Multiply the master's rows, along its first dimension, by (rows,) numbers, inside `Shards.rescaling`."""

    def piece(self, kind: str) -> Piece:
        return Piece(self.get(kind), self.shape, self.start)


class Shards(ABC):
    """All parameters of an engine's module, in the module's order."""

    def __init__(self, shards: list[Shard], optimizer: torch.optim.Optimizer):
        self._by_name, self._optimizer = {shard.name: shard for shard in shards}, optimizer

    def __iter__(self) -> Iterator[Shard]:
        return iter(self._by_name.values())

    def __getitem__(self, name: str) -> Shard:
        return self._by_name[name]

    @property
    @abstractmethod
    def stepped(self) -> list[Tensor]:
        """The tensors that the optimizer steps."""

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the optimizer's state tensors of the parameters' shape; empty before its first step."""
        stepped = self.stepped[0]
        state = self._optimizer.state.get(stepped, {})
        return tuple(key for key, value in state.items() if torch.is_tensor(value) and value.shape == stepped.shape)

    @property
    def optimizer_step(self) -> int:
        """How many steps the optimizer has taken."""
        steps = {int(state["step"]) for state in self._optimizer.state.values()}
        assert len(steps) <= 1, f"the optimizer's groups have taken different numbers of steps: {steps}"
        return steps.pop() if steps else 0

    def set_optimizer_step(self, step: int) -> None:
        """Let the optimizer have taken `step` steps: 0 forgets its state, more creates moments where there are none."""
        state = self._optimizer.state
        if step == 0:
            state.clear()
        elif not state:
            self._create_moments()
        for values in state.values():
            values["step"] = torch.full_like(values["step"], step) if torch.is_tensor(values["step"]) else step

    def _create_moments(self) -> None:
        """Have the optimizer lay out its own state, by a step that moves nothing: gradients and rate are zero."""
        rates = [group["lr"] for group in self._optimizer.param_groups]
        gradients = [tensor.grad for tensor in self.stepped]
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0
        for tensor in self.stepped:
            tensor.grad = tensor.new_zeros(1).expand_as(tensor)  # without memory of its own
        self._step_once()
        for tensor, gradient in zip(self.stepped, gradients, strict=True):
            tensor.grad = gradient
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def fill(self, values: Values) -> None:
        """Set all masters, piece by piece. All ranks take part."""
        with self.rewriting():
            for shard in self:
                if shard.start < shard.stop:
                    shard.set(MASTER, values.read(shard.name, shard.start, shard.stop))

    @abstractmethod
    def copy_to(self, network: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Set a network of the same shape and stage, none of whose parameters stays whole in stage 3, to these values.

        They are given as this rank's intervals by name. All ranks take part.
        """

    @abstractmethod
    def _step_once(self) -> None: ...

    @abstractmethod
    def rewriting(self) -> AbstractContextManager[None]:
        """Masters and moments may be set inside, and all that follows sees them. All ranks take part."""

    @abstractmethod
    def rescaling(self) -> AbstractContextManager[None]:
        """Rows of masters may be scaled inside, by the same numbers on all ranks, and forwards see it."""


class _PartitionedShard(Shard):
    def __init__(self, name: str, parameter: nn.Parameter, zero: Zero3):
        assert parameter.requires_grad, f"{name} is frozen: ZeRO-3 keeps no master of it"
        super().__init__(name, whole_shape(parameter))
        self._parameter, self._zero = parameter, zero

    def get(self, kind: str) -> Tensor:
        group, place = self._zero.place(self._parameter)
        flat = self._zero.flat_masters[group].detach()
        if kind != MASTER:
            flat = self._zero.optimizer.state[self._zero.flat_masters[group]][kind]
        return flat[place][: self.stop - self.start]

    def set(self, kind: str, values: Tensor) -> None:
        self.get(kind).copy_(values)
        if kind == MASTER:
            self._show(values)

    def scale_rows(self, factors: Tensor) -> None:
        values = self.master
        for rows, part in row_parts(self.start, self.stop, self.numel // self.shape[0]):
            values[part].view(rows.stop - rows.start, -1).mul_(factors[rows, None])
        self._show(values)

    def _show(self, values: Tensor) -> None:
        """To forwards."""
        compute_shard(self._parameter).data[: len(values)].copy_(values)


class PartitionedShards(Shards):
    """ZeRO-3: nobody has more than its shard. Moments exist from the first optimizer step on."""

    def __init__(self, module: nn.Module, zero: Zero3):
        self._zero = zero
        shards = [_PartitionedShard(name, parameter, self._zero) for name, parameter in module.named_parameters()]
        super().__init__(list(shards), self._zero.optimizer)

    @property
    def stepped(self) -> list[Tensor]:
        return self._zero.flat_masters

    def _step_once(self) -> None:
        self._zero.step_flat_masters()

    def copy_to(self, network: nn.Module, values: Mapping[str, Tensor]) -> None:
        for name, parameter in network.named_parameters():
            compute_shard(parameter).data[: values[name].numel()].copy_(values[name])

    @contextmanager
    def rewriting(self) -> Iterator[None]:
        self._zero.drop_whole_copies()
        yield
        self._zero.gather_whole_copies()

    def rescaling(self) -> AbstractContextManager[None]:
        return self.rewriting()


class _ReplicatedShard(Shard):
    def __init__(self, name: str, master: Tensor, optimizer: torch.optim.Optimizer):
        super().__init__(name, tuple(master.shape))
        self.whole, self._optimizer = master, optimizer

    def get(self, kind: str) -> Tensor:
        whole = self.whole if kind == MASTER else self._optimizer.state[self.whole][kind]
        return whole.detach().view(-1)[self.start : self.stop]

    def set(self, kind: str, values: Tensor) -> None:
        self.get(kind).copy_(values)

    def scale_rows(self, factors: Tensor) -> None:
        self.whole.detach().view(self.shape[0], -1).mul_(factors[:, None])


class ReplicatedShards(Shards):
    """ZeRO-0: every rank has everything, and keeps its interval of the EMA and of checkpoints."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer):
        self._parameters = dict(module.named_parameters())
        masters = [master for group in optimizer.param_groups for master in group["params"]]
        pairs = zip(self._parameters, masters, strict=True)
        super().__init__([_ReplicatedShard(name, master, optimizer) for name, master in pairs], optimizer)

    @property
    def stepped(self) -> list[Tensor]:
        return [shard.whole for shard in self]  # pyright: ignore[reportAttributeAccessIssue]

    def _step_once(self) -> None:
        self._optimizer.step()

    def copy_to(self, network: nn.Module, values: Mapping[str, Tensor]) -> None:
        for name, parameter in network.named_parameters():
            parameter.data.copy_(_completed(values[name], parameter))

    @contextmanager
    def rewriting(self) -> Iterator[None]:
        yield
        with torch.no_grad():
            for shard in self:
                for kind in (MASTER, *self.moments):
                    whole = shard.whole if kind == MASTER else self._optimizer.state[shard.whole][kind]  # pyright: ignore[reportAttributeAccessIssue]
                    whole.copy_(_completed(shard.get(kind), whole))
        self._show_masters()

    @contextmanager
    def rescaling(self) -> Iterator[None]:
        yield
        self._show_masters()

    @torch.no_grad()
    def _show_masters(self) -> None:
        """To the forward."""
        for shard in self:
            self._parameters[shard.name].copy_(shard.whole)  # pyright: ignore[reportAttributeAccessIssue]


def _completed(local: Tensor, whole: Tensor) -> Tensor:
    """A tensor of `whole`'s shape from the intervals of all ranks."""
    padded = local.new_zeros(-(-whole.numel() // dist.get_world_size()))
    padded[: local.numel()] = local
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, padded)
    return torch.cat(parts)[: whole.numel()].view(whole.shape)
