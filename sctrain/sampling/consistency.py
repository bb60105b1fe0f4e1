"""Samplers of students: consistency functions that go to the data, and networks that jump between any two times."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sctrain.parameterization import Network
from sctrain.processes import denoise, jump, sigma_at
from sctrain.randomness import Purpose, SampleGenerator
from sctrain.sampling.noise import noised


@torch.no_grad()
def consistency_sample(
    network: Network,
    noise: Tensor,
    conditions: tuple[Any, ...],
    sigma_data: float,
    times: Sequence[float],
    seed: int,
    indices: Tensor,
    anchor: float = 0.0,
    mended: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Multistep consistency sampling (CM 2023, algorithm 1), one network evaluation at each of `times`, descending.

    `anchor` is the noise level at which the consistency function is the identity. `indices` (B,) number the images.
    `mended` changes the images (B, C, H, W) after every evaluation: zero-shot editing puts back what is known.
    """
    fresh = SampleGenerator(seed, indices, Purpose.FRESH_NOISE)
    x = noise
    for i, time in enumerate(times):
        if i > 0:
            x = noised(x, sigma_data * fresh.normal(x.shape[1:]).to(x), time, sigma_data, anchor)
        t = x.new_full((len(x),), time)
        x = denoise(x, network(x / sigma_data, t, *conditions)[0], t, sigma_data)
        x = x if mended is None else mended(x)
    return x


@torch.no_grad()
def jump_sample(
    network: Network,
    noise: Tensor,
    conditions: tuple[Any, ...],
    sigma_data: float,
    times: Sequence[float],
    seed: int,
    indices: Tensor,
    gamma: float = 0.0,
    *,
    told_the_end: bool = True,
) -> Tensor:
    """Jumps from each of `times` to the next, the last of which is 0: one network evaluation each.

    CTM's gamma-sampling (Kim et al. 2023, algorithm 3): a jump goes below its goal, to the level
    sqrt(1 - gamma^2) sigma, and noise gamma sigma brings it back. gamma = 0 is deterministic: the jumps of multistep
    sCD and, by networks that are not told the end (`told_the_end` False), of progressive distillation. gamma = 1 is
    multistep consistency sampling. A network that is told the end takes it third, after labels and guidance.
    """
    fresh = SampleGenerator(seed, indices, Purpose.FRESH_NOISE)
    x = noise
    for time, goal in pairwise(times):
        below = goal if gamma == 0 else math.atan(math.sqrt(1 - gamma**2) * math.tan(goal))
        t, end = (x.new_full((len(x),), value) for value in (time, below))
        told = (*(*conditions, None)[:2], end) if told_the_end else conditions  # labels, guidance, end
        x = jump(x, network(x / sigma_data, t, *told)[0], t, end, sigma_data)
        if gamma > 0 and goal > 0:
            z = sigma_data * fresh.normal(x.shape[1:]).to(x)
            x = noised(x / math.cos(below), z, goal, sigma_data, sigma_at(below, sigma_data))
    return x
