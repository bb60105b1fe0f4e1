"""What to change in a description so that it fits: the micro-batch, then checkpointing, then DeepSpeed's buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sctrain.config.checks import check
from sctrain.config.schema import RunConfig
from sctrain.config.yaml_text import merged
from sctrain.errors import UserError
from sctrain.planning.counting import Counted
from sctrain.planning.memory import Layout, Memory, counted_of, memory
from sctrain.planning.speed import Hardware, Speed, speed

ROOM = 0.9  # of a GPU's memory: the rest is for the allocator's gaps, the libraries and the GPU's own needs
_CHECKPOINTING = {"compute": {"checkpointing": True}}
# Buckets an order smaller than DeepSpeed's defaults, and nothing kept whole for later.
_LEAN = {
    "deepspeed": {
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 50_000_000,
            "stage3_prefetch_bucket_size": 10_000_000,
            "stage3_max_reuse_distance": 0,
        }
    }
}
_OFFLOAD = {"offload": {"optimizer": "cpu", "ema": "cpu"}}
_LADDER: tuple[tuple[dict[str, Any], ...], ...] = (
    (),
    (_CHECKPOINTING,),
    (_LEAN,),
    (_CHECKPOINTING, _LEAN),
    (_CHECKPOINTING, _LEAN, _OFFLOAD),
)


@dataclass(frozen=True)
class Plan:
    """A description with what it takes. `changes` are overrides of the one that was asked about."""

    layout: Layout
    counted: Counted
    memory: Memory
    speed: Speed
    changes: tuple[str, ...]

    def fits(self, room: float) -> bool:
        """Whether it stays below so many bytes per rank."""
        return self.memory.peak <= room


def plan(
    layout: Layout,
    hardware: Hardware,
    changes: Sequence[str] = (),
    counted: Counted | None = None,
) -> Plan:
    """Of one description as it is, itemised; `counted` where that is known."""
    counted = counted or counted_of(layout)
    found = memory(layout, counted)
    return Plan(layout, counted, found, speed(layout, counted, hardware), tuple(changes))


def fitting(layout: Layout, hardware: Hardware, room: float) -> Plan | None:
    """The faster one of the first two rungs of the ladder that fit; None where nothing does."""
    found: list[tuple[Layout, Counted]] = []
    for changes in _LADDER:
        changed = _changed(layout.config, changes)
        if changed is None:
            continue
        rung = _largest(replace(layout, config=changed), room, layout.config)
        found += [] if rung is None else [rung]
        if len(found) == 2:
            break
    if not found:
        return None
    best, counted = min(found, key=lambda each: speed(*each, hardware).seconds)
    return plan(best, hardware, list(_overrides(layout.config, best.config)), counted)


def _changed(config: RunConfig, changes: Sequence[dict[str, Any]]) -> RunConfig | None:
    """None where this version of the trainer refuses the change, or it changes nothing."""
    values = config.model_dump()
    for change in changes:
        values = merged(values, change)
    if changes and values == config.model_dump():
        return None
    changed = RunConfig.model_validate(values)
    try:
        check(changed)
    except UserError:
        return None
    return changed


def _largest(layout: Layout, room: float, asked: RunConfig) -> tuple[Layout, Counted] | None:
    """The largest micro-batch that fits. It is looked for on the line through two small ones, and then counted."""
    share = layout.config.batch.global_size // layout.world
    sizes = sorted((m for m in range(1, share + 1) if share % m == 0), reverse=True)
    sizes = [micro for micro in sizes if micro <= asked.batch.micro_limit]
    small = {micro: counted_of(_with_micro(layout, micro)) for micro in (1, 2)}
    one, two = small.values()
    base = memory(_with_micro(layout, 1), one, itemised=False)
    for micro in sizes:
        guess = one.peak + (micro - 1) * (two.peak - one.peak)
        if sum(base.held.values()) + max(guess, base.optimizer) > room:
            continue
        chosen = _with_micro(layout, micro)
        counted = small.get(chosen.micro) or counted_of(chosen)
        if memory(chosen, counted, itemised=False).peak <= room:
            return chosen, counted
    return None


def _with_micro(layout: Layout, micro: int) -> Layout:
    batch = layout.config.batch.model_copy(update={"micro_limit": micro})
    return replace(layout, config=layout.config.model_copy(update={"batch": batch}))


def _overrides(asked: RunConfig, changed: RunConfig) -> Iterator[str]:
    """`key=value` as the command line takes them."""
    before, after = dict(_leaves(asked.model_dump(mode="json"))), dict(_leaves(changed.model_dump(mode="json")))
    for key, value in after.items():
        if before.get(key) != value:
            yield f"{key}={str(value).lower() if isinstance(value, bool) else value}"


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
