"""ZeRO-3 played on tensors without memory: which parameters are whole when, what gathering and reducing takes.

The rules are those of DeepSpeed's partitioned_param_coordinator.py and stage3.py: modules gather their parameters
before they run, the next ones of the recorded trace are gathered ahead, what is used again soon stays. What autograd
keeps of a gathered parameter (a linear layer's transposed weight) outlives its release here as it does there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.tangent.dual import Dual

_DEFAULTS = {
    "stage3_max_live_parameters": 10**9,
    "stage3_max_reuse_distance": 10**9,
    "stage3_prefetch_bucket_size": 5 * 10**7,
    "stage3_param_persistence_threshold": 10**5,
    "reduce_bucket_size": 5 * 10**8,
    "sub_group_size": 10**9,
}


@dataclass(frozen=True)
class Zero3Sizes:
    """Those of DeepSpeed's settings that decide, in elements."""

    world: int
    live: int
    reuse: int
    prefetch: int
    persistence: int
    bucket: int
    sub_group: int

    @staticmethod
    def of(zero: Mapping[str, Any], world: int) -> Zero3Sizes:
        """Out of the `zero_optimization` section."""
        return Zero3Sizes(world, *(int(zero.get(key, value)) for key, value in _DEFAULTS.items()))

    def shard(self, numel: int) -> int:
        """Elements of one parameter that a rank holds, with padding."""
        return -(-numel // self.world)

    def persists(self, numel: int) -> bool:
        """Whether a parameter of this size stays whole on every rank."""
        return numel <= self.persistence


@dataclass(eq=False)
class _Parameter:
    parameter: nn.Parameter
    shape: tuple[int, ...]
    numel: int
    pending: _Gather | None = None  # under way
    whole: bool = False
    used_by: set[int] = field(default_factory=set)
    fetched_for: int = -1  # the last step of the trace that it was gathered for


@dataclass(eq=False)
class _Gather:
    """One all-gather; its buffer lives until every parameter in it was waited for."""

    parameters: list[_Parameter]
    buffer: Tensor
    done: bool = False


class Zero3Gathering:
    """Hooks on a network that empty its parameters and gather them as ZeRO-3 would."""

    def __init__(self, network: nn.Module, sizes: Zero3Sizes):
        self._sizes = sizes
        self._of: dict[int, list[_Parameter]] = {}  # by module
        self._trace: list[int] = []  # modules in the order in which they ran in the last step
        self._order: list[int] = []
        self._queue: deque[tuple[_Parameter, int]] = deque()
        self._step = self._available = 0
        self._bucket: list[tuple[int, Tensor | None]] = []  # elements of each gradient, and those kept outside
        self._dtype = torch.float32
        self.gathered = 0  # elements, in this step
        shared: dict[int, _Parameter] = {}
        for module in network.modules():
            own = [_shared(shared, p) for p in module.parameters(recurse=False) if not sizes.persists(p.numel())]
            if own:
                self._of[id(module)] = own
                module.register_forward_pre_hook(self._before_forward)
                module.register_forward_hook(self._after_forward)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._reduce)
        for known in shared.values():
            known.parameter.data = known.parameter.new_empty(0)

    def end_of_step(self) -> None:
        """Reduce what is left, release what is left, and go on with the trace of this step."""
        self._flush()
        for known in {id(p): p for own in self._of.values() for p in own}.values():
            known.used_by.clear()
            self._release(known)
            known.fetched_for = -1
        self._trace, self._order = self._order, []
        self._queue = deque((p, step) for step, module in enumerate(self._trace) for p in self._of[module])
        self._step = self._available = self.gathered = 0

    # --- a module runs -------------------------------------------------------------------------------------------

    def _before_forward(self, module: nn.Module, inputs: tuple) -> tuple:
        self._fetch(module)
        return tuple(_through(x, lambda: self._leave(module)) for x in inputs)

    def _after_forward(self, module: nn.Module, inputs: tuple, out: Any) -> Any:
        self._leave(module)
        if isinstance(out, tuple):
            return tuple(_through(x, lambda: self._fetch(module)) for x in out)
        return _through(out, lambda: self._fetch(module))

    @torch.no_grad()
    def _fetch(self, module: nn.Module) -> None:
        own = self._of[id(module)]
        self._gather([p for p in own if not p.whole and p.pending is None])
        for known in own:
            known.used_by.add(id(module))
            if known.pending is not None:
                self._arrive(known)
        self._order.append(id(module))
        if self._trace:
            self._prefetch(own)
        self._step += 1

    def _prefetch(self, own: list[_Parameter]) -> None:
        waiting = {id(p) for p in own if p.fetched_for < self._step}
        while self._queue and waiting:
            known, step = self._queue.popleft()
            known.fetched_for = step
            waiting.discard(id(known))
        room, ahead = min(self._sizes.live - self._available, self._sizes.prefetch), []
        while self._queue and sum(p.numel for p in ahead) < room:
            known, step = self._queue.popleft()
            known.fetched_for = max(known.fetched_for, step)
            if not known.whole and known.pending is None and known not in ahead:
                ahead.append(known)
        self._gather(ahead)

    def _gather(self, parameters: list[_Parameter]) -> None:
        if not parameters:
            return
        numel = sum(self._sizes.shard(p.numel) * self._sizes.world for p in parameters)
        made = _Gather(parameters, parameters[0].parameter.new_empty(numel))
        for known in parameters:
            known.pending = made
        self._available += sum(p.numel for p in parameters)
        self.gathered += numel

    def _arrive(self, known: _Parameter) -> None:
        """Copies of all parameters of its gather are made when the first is waited for; of one alone it is a view."""
        made, known.pending = known.pending, None
        assert made is not None
        if not made.done:
            for each in made.parameters:
                whole = made.buffer if len(made.parameters) == 1 else each.parameter.new_empty(each.numel)
                each.parameter.data = whole[: each.numel].view(each.shape)
                each.whole = True
            made.done = True

    @torch.no_grad()
    def _leave(self, module: nn.Module) -> None:
        own = self._of[id(module)]
        stays = set(self._used_soon()) if self._trace else set()
        for known in own:
            known.used_by.discard(id(module))
            if not known.used_by and id(known) not in stays and not (self._trace and known.fetched_for > self._step):
                self._release(known)

    def _used_soon(self) -> Iterator[int]:
        traversed = 0
        for module in self._trace[self._step :]:
            if traversed >= self._sizes.reuse:
                return
            for known in self._of[module]:
                traversed += known.numel
                yield id(known)

    def _release(self, known: _Parameter) -> None:
        if known.whole:
            known.parameter.data = known.parameter.new_empty(0)
            known.whole = False
            self._available -= known.numel

    # --- gradients -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _reduce(self, parameter: nn.Parameter) -> None:
        """A gradient goes into the bucket; one that is larger than that stays where it is."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        numel, held = gradient.numel(), sum(numel for numel, _ in self._bucket)
        if self._bucket and held + numel > self._sizes.bucket:
            self._flush()
            held = 0
        self._dtype = gradient.dtype
        self._bucket.append((numel, gradient if held + numel > self._sizes.bucket else None))

    def _flush(self) -> None:
        """The reduce-scatter takes a copy of the bucket, by ranks, unless one gradient alone needs no padding."""
        if len(self._bucket) > 1 or (self._bucket and self._bucket[0][0] % self._sizes.world):
            torch.empty(
                sum(self._sizes.shard(numel) * self._sizes.world for numel, _ in self._bucket), dtype=self._dtype
            )
        self._bucket.clear()


def _shared(known: dict[int, _Parameter], parameter: nn.Parameter) -> _Parameter:
    made = _Parameter(parameter, tuple(parameter.shape), parameter.numel())
    return known.setdefault(id(parameter), made)


class _Passing(torch.autograd.Function):
    """The identity, which says when the gradient comes by."""

    @staticmethod
    def forward(ctx, x, told):
        ctx.told = told
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.told()
        return gradient, None


def _through(x: Any, told: Callable[[], None]) -> Any:
    if isinstance(x, Dual):
        return Dual(_through(x.value, told), x.tangent)
    if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
        return _Passing.apply(x, told)
    return x
