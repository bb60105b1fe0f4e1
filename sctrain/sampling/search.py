"""The best times for multistep sampling, found one after the other (CM 2023, section 6)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple


class Found(NamedTuple):
    """An argument and its score; lower is better."""

    at: float
    score: float


def ternary_search(score: Callable[[float], float], low: float, high: float, rounds: int) -> Found:
    """The best argument tried for a `score` that falls and then rises in (low, high): two thirds remain of each round.

    2 * rounds evaluations of the score; a minimum is found to within (high - low) (2/3)^rounds.
    """
    assert low < high and rounds >= 1
    tried: list[Found] = []
    for _ in range(rounds):
        left, right = (Found(at, score(at)) for at in (low + (high - low) / 3, high - (high - low) / 3))
        tried += [left, right]
        if left.score < right.score:
            high = right.at
        else:
            low = left.at
    return min(tried, key=lambda found: found.score)


def greedy_times(
    score: Callable[[Sequence[float]], float], start: float, steps: int, rounds: int, low: float = 0.0
) -> tuple[list[float], float]:
    """Times of a `steps`-step sampler, descending from `start`, and their score.

    Every time is searched between `low` and the one before it, with those found so far held: greedy, as in the paper.
    """
    times, best = [start], None
    for _ in range(steps - 1):
        found = ternary_search(partial(_with_one_more, score, times), low, times[-1], rounds)
        times, best = [*times, found.at], found.score
    return times, score(times) if best is None else best


def _with_one_more(score: Callable[[Sequence[float]], float], times: Sequence[float], time: float) -> float:
    return score([*times, time])
