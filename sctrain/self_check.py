"""Is the tangent right? The engine's own, block by block, against central differences of the real, sharded network.

Both are taken in float32 on the float32 weights, along the direction of training, on a few samples of the first batch;
the best of three step sizes counts. A run in another precision then has its tangent compared with the float32 one. A
tangent that is zero (fresh gates that let nothing pass) is not verified, whatever it agrees with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.tangent.dual import Dual
from models.tangent.randomness import RandomState
from sctrain.zero.world import World

STEPS = (3e-2, 1e-2, 3e-3)  # of the differences, in units of the direction; float32 rounds away what is much smaller
SAMPLES = 2  # per rank
Call = tuple[str, int]  # a module by name, and how often it was called before in one evaluation of the network
WHOLE: Call = ("", 0)


@dataclass(frozen=True)
class Arguments:
    """Of one evaluation with a tangent: (u, t), its direction, and what else the network takes."""

    primals: Sequence[Tensor]
    direction: Sequence[Tensor]
    conditions: Sequence[Tensor | None]

    def shifted(self, step: float) -> tuple[Tensor | None, ...]:
        moved = (x + step * t_x for x, t_x in zip(self.primals, self.direction, strict=True))
        return *moved, *self.conditions

    def first(self, samples: int) -> Arguments:
        conditions = [None if x is None else x[:samples] for x in self.conditions]
        primals, direction = ([x[:samples] for x in xs] for xs in (self.primals, self.direction))
        return Arguments(primals, direction, conditions)


@dataclass(frozen=True)
class Verdict:
    """Relative errors, None where nothing could be verified.

    `blocks` against central differences; `running` of the running precision against float32, empty where they are one.
    """

    blocks: dict[str, float | None]
    running: dict[str, float | None] = field(default_factory=dict)

    @property
    def unverified(self) -> list[str]:
        return [name for name, error in (self.blocks | self.running).items() if error is None]

    @property
    def worst(self) -> tuple[str, float]:
        """The block with the largest error; an empty name if none was verified."""
        known = {name: error for name, error in self.blocks.items() if error is not None}
        return max(known.items(), key=lambda item: item[1], default=("", 0.0))

    def __str__(self) -> str:
        name, error = self.worst
        parts = [f"worst error {error:.1e} ({name}) against central differences"] if name else []
        if self.unverified:
            parts.append(f"not verified, for their tangents are zero: {_listed(self.unverified)}")
        parts += [f"error of the {name} {error:.1e} against float32" for name, error in self.running.items() if error]
        return f"{len(self.blocks)} blocks, {'; '.join(parts)}"


def verify(
    engine: Callable,
    running: Callable[..., Sequence[Tensor]],
    exact: Callable[..., Sequence[Tensor]],
    module: nn.Module,
    arguments: Arguments,
    world: World,
) -> Verdict:
    """Compare on all ranks, each with samples of its own.

    `exact` evaluates `module` in float32; `running` is the network in training, the same object where that is float32.
    """
    arguments = arguments.first(SAMPLES)
    with torch.no_grad(), RandomState(arguments.primals[0].device).replayed():
        traced = _Tangents()
        with _watching(module, traced):
            t_exact = _tangent(engine, exact, arguments)
        traced.found[WHOLE] = t_exact.float()  # of the whole, which engines that carry no Duals give too
        sums = {call: [t.double().square().sum()] for call, t in traced.found.items()}
        lost: set[str] = set()
        for step in STEPS:
            differences = _differences(exact, module, arguments, step)
            for call, t in traced.found.items():
                sums[call].append((t - differences[call]).double().square().sum())
            lost |= {call[0] for call in traced.lost if differences[call].any()}
        coarse: dict[str, float | None] = {}
        if running is not exact:
            t_running = _tangent(engine, running, arguments)
            squares = torch.stack([x.double().square().sum() for x in (t_exact, t_running - t_exact)])
            size, error = world.sum(squares).tolist()
            coarse["running precision"] = (error / size) ** 0.5 if size else None
    assert not lost, f"an operation in {sorted(lost)} lost the tangent"
    return Verdict(_by_block(sums, world), coarse)


def _tangent(engine: Callable, network: Callable, arguments: Arguments) -> Tensor:
    with RandomState(arguments.primals[0].device).replayed():
        return engine(network, arguments.primals, arguments.direction, *arguments.conditions)[1]


def _differences(network: Callable, module: nn.Module, arguments: Arguments, step: float) -> dict[Call, Tensor]:
    """Central differences of the first output of every module, and of the network, which may transform the module's."""
    ends = []
    for sign in (1, -1):
        values = _Values()
        with _watching(module, values), RandomState(arguments.primals[0].device).replayed():
            whole = network(*arguments.shifted(sign * step))[0]
        values.found[WHOLE] = whole
        ends.append(values.found)
    return {call: (ends[0][call] - ends[1].pop(call)) / (2 * step) for call in ends[0]}


def _by_block(sums: dict[Call, list[Tensor]], world: World) -> dict[str, float | None]:
    """The largest error of the modules of each block; None if the tangent of any of them is zero.

    `sums` are squares by module: of the tangent, then of its difference at each step size.
    """
    totals = world.sum(torch.stack([torch.stack(values) for values in sums.values()])).tolist()
    blocks: dict[str, float | None] = {}
    for (name, _), (size, *errors) in zip(sums, totals, strict=True):
        error = (min(errors) / size) ** 0.5 if size else None
        block, known = _block(name), blocks.get(_block(name), 0.0)
        blocks[block] = None if error is None or known is None else max(known, error)
    return blocks


def _block(name: str) -> str:
    """`blocks.3` of `blocks.3.attention_norm.modulation`; the first part of any other name."""
    parts = name.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdecimal() else parts[0] or "network"


@dataclass
class _Tangents:
    """Tangents of modules that are given one; `lost` are those that return none."""

    found: dict[Call, Tensor] = field(default_factory=dict)
    lost: list[Call] = field(default_factory=list)

    def see(self, call: Call, inputs: tuple, out: Tensor) -> None:
        if isinstance(out, Dual):
            self.found[call] = out.tangent.float()
        elif any(isinstance(x, Dual) for x in inputs):
            self.lost.append(call)


@dataclass
class _Values:
    found: dict[Call, Tensor] = field(default_factory=dict)

    def see(self, call: Call, inputs: tuple, out: Tensor) -> None:
        self.found[call] = out


@contextmanager
def _watching(module: nn.Module, watcher: _Tangents | _Values) -> Iterator[None]:
    """Show the watcher the first output of every module, each time that it is called."""
    calls: Counter[str] = Counter()

    def hook(name: str) -> Callable:
        def show(_: nn.Module, inputs: tuple, out: Tensor | Sequence[Tensor]) -> None:
            watcher.see((name, calls[name]), inputs, out if isinstance(out, Tensor) else out[0])
            calls[name] += 1
            if not name:  # the whole module is through: the next evaluation counts from the start
                calls.clear()

        return show

    handles = [part.register_forward_hook(hook(name)) for name, part in module.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _listed(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
