"""At which times (radians) a sampler evaluates the network."""

import math
from collections.abc import Sequence

from sctrain.objectives.levels import Grid, ddim_times
from sctrain.processes import T_MAX, sigma_at, time_at


def step_times(steps: int, middle_time: float = 1.1, start: float = T_MAX, end: float = 0.0) -> list[float]:
    """Times of a `steps`-step consistency sampler, descending from `start`.

    One: `start`. Two: `start` and `middle_time` (sCM appendix G). More: the rest divides [`end`, `middle_time`] evenly.
    A middle that lies before the start, of a process that ends early, keeps its share of the way.
    """
    middle = middle_time if middle_time < start else middle_time * start / (math.pi / 2)
    return [start, *(middle + (end - middle) * i / (steps - 1) for i in range(steps - 1))]


def karras_times(
    steps: int, sigma_data: float, sigma_min: float = Grid.sigma_min, rho: float = Grid.rho, start: float = T_MAX
) -> list[float]:
    """`steps` + 1 times from `start` to 0: EDM's noise levels (Karras et al. 2022, eq. 5), t = arctan(sigma/sigma_d).

    The last before 0 is that of `sigma_min`, unless there is one step alone.
    """
    grid = Grid(sigma_min, sigma_at(start, sigma_data), rho)
    lower = grid.levels(steps).flip(0)[1:].tolist() if steps > 1 else []
    return [start, *(time_at(sigma, sigma_data) for sigma in lower), 0.0]


def even_times(steps: int) -> list[float]:
    """T_MAX i / N from i = N to 0: the ends of the jumps of progressive distillation and of multistep sCD."""
    return [T_MAX * i / steps for i in range(steps, -1, -1)]


def nearest_times(times: Sequence[float], trained: Sequence[float]) -> list[float]:
    """The nearest of `trained` to each of `times`, none twice. Both descend; `times` are no more than `trained`."""
    assert len(times) <= len(trained)
    nearest, free = [], 0
    for i, time in enumerate(times):
        last = len(trained) - (len(times) - i)  # one is left for each time that follows
        index = min(range(free, last + 1), key=lambda index: abs(trained[index] - time))
        nearest.append(trained[index])
        free = index + 1
    return nearest


def lcm_times(ddim_steps: int, steps: int) -> list[float]:
    """`steps` of the `ddim_steps` times that LCM trains at, taken evenly from the last one down."""
    assert 1 <= steps <= ddim_steps
    times = ddim_times(ddim_steps).tolist()  # of which the first is 0
    return [times[ddim_steps - i * ddim_steps // steps] for i in range(steps)]
