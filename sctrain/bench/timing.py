"""Ratios of times that survive a noisy machine: the baseline runs directly before and after everything else."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

WARM_UP = 2  # runs of everything before the first round
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Step:
    """Something to time, and what has to follow it untimed."""

    run: Callable[[], object]
    finish: Callable[[], object] = lambda: None

    def seconds(self, barrier: Callable[[], object]) -> float:
        """Of one run, once all ranks have come here."""
        barrier()
        _synchronize()
        begin = time.perf_counter()
        self.run()
        _synchronize()
        seconds = time.perf_counter() - begin
        self.finish()
        return seconds


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of some measurements."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Timed:
    """Seconds, and their ratio to the baseline runs around each."""

    seconds: Spread
    ratio: Spread


def interleaved(
    baseline: Step, others: Mapping[Key, Step], rounds: int, barrier: Callable[[], object] = lambda: None
) -> tuple[Spread, dict[Key, Timed]]:
    """Seconds of the baseline, and of all others with their ratios: A x A y A z A in every round."""
    for step in (baseline, *others.values()):
        for _ in range(WARM_UP):
            step.seconds(barrier)
    base: list[float] = []
    seconds: dict[Key, list[float]] = {key: [] for key in others}
    ratios: dict[Key, list[float]] = {key: [] for key in others}
    for _ in range(rounds):
        base.append(baseline.seconds(barrier))
        for key, step in others.items():
            seconds[key].append(step.seconds(barrier))
            base.append(baseline.seconds(barrier))
            ratios[key].append(2 * seconds[key][-1] / (base[-2] + base[-1]))
    return Spread.of(base), {key: Timed(Spread.of(seconds[key]), Spread.of(ratios[key])) for key in others}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
